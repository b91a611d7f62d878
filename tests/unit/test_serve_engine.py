"""The engine: mixed batches that rows join and leave, seeds, stops, failures; against one model and one request."""

import json
import threading
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import curlora
from curlora.mixed import BASE
from pipelines.serve.cache import Batching
from pipelines.serve.contract import AdapterError, Busy, Draining, NotFinite, TooLate
from pipelines.serve.engine import Engine, Limits
from pipelines.serve.shared_model import SharedModel
from tests.conftest import make_model, make_tokenizer
from tests.unit.serving import Answer, ask, greedy_alone, write_adapter

PROMPTS = [[7], [40, 3, 41], [9, 10, 11, 12, 13, 14, 15], [100, 2, 50, 61, 77], [33, 34]]
NAMES = ["one", BASE, "two", "one", "three"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters with the same rows and columns, and one with others."""
    root, base = tmp_path_factory.mktemp("adapters"), make_model(make_tokenizer())
    written = {name: write_adapter(base, root / name, seed) for seed, name in enumerate(("one", "two", "four"), 1)}
    return written | {"three": write_adapter(base, root / "three", 9, r=3, seed=5), BASE: None}


@pytest.fixture(scope="module")
def engine(folders):
    engine = _engine(folders)
    yield engine
    engine.close()


def _engine(folders, limits=None, base=None) -> Engine:
    tokenizer = make_tokenizer()
    model = SharedModel(base or make_model(tokenizer))
    for name, folder in folders.items():
        if folder:
            model.load(name, folder)
    return Engine(model, tokenizer, limits or Limits(tokens=2048, rows=8, waiting=64))


def _answers(engine, asks) -> list[Answer]:
    answers = [Answer() for _ in asks]
    engine.submit(asks, answers)
    return [answer.wait() for answer in answers]


def _idle(engine) -> bool:
    """Whether the batch empties; rows leave it after their listener has heard the last piece."""
    for _ in range(500):
        if engine.running == engine.waiting == 0:
            return True
        time.sleep(0.01)
    return False


def test_a_mixed_batch_gives_each_row_what_its_adapter_says_alone(engine, folders):
    base = make_model(make_tokenizer())
    expected = [greedy_alone(base, folders[n], p, 12) for n, p in zip(NAMES, PROMPTS, strict=True)]
    found = _answers(engine, [ask(name, prompt) for name, prompt in zip(NAMES, PROMPTS, strict=True)])
    assert [answer.tokens for answer in found] == expected
    same = _answers(engine, [ask(name, PROMPTS[2]) for name in ("one", BASE, "two", "three")])
    assert len({tuple(answer.tokens) for answer in same}) == 4, "adapters that agree would prove nothing"


def test_rows_that_join_and_leave_at_any_token_change_no_other_row(engine, folders):
    lengths = [3, 25, 1, 14, 8, 30, 2, 19, 5, 11]
    asks = [ask(NAMES[i % 5], PROMPTS[(i * 2) % 5], n) for i, n in enumerate(lengths)]
    alone = [_answers(engine, [one])[0].tokens for one in asks]
    answers = [Answer() for _ in asks]
    for one, answer in zip(asks, answers, strict=True):  # more than the batch holds, one after the other
        engine.submit([one], [answer])
        time.sleep(0.003)
    assert [answer.wait().tokens for answer in answers] == alone
    assert [len(tokens) for tokens in alone] == lengths
    assert _idle(engine)


def test_rows_are_in_the_batch_together(folders):
    engine = _engine(folders, Limits(tokens=10_000, rows=3, waiting=64))
    most, forward = [], engine.model.__class__.__call__

    class Watched(SharedModel):
        def __call__(self, names, **inputs):
            most.append((len(names), len(set(names))))
            return forward(self, names, **inputs)

    engine.model.__class__ = Watched
    _answers(engine, [ask(name, prompt) for name, prompt in zip(NAMES, PROMPTS, strict=True)])
    engine.close()
    assert (3, 3) in most and max(rows for rows, _ in most) == 3


def test_the_batch_holds_no_more_tokens_than_it_may(folders):
    engine = _engine(folders, Limits(tokens=40, rows=8, waiting=64))
    sizes = []
    inner = engine._forward

    def watched(names, cache, ids, mask=None, positions=None):
        sizes.append((len(names), len(names) * mask.shape[1]))
        return inner(names, cache, ids, mask, positions)

    engine._forward = watched
    _answers(engine, [ask("one", prompt, 12) for prompt in PROMPTS * 2])
    assert max(rows for rows, _ in sizes) == 2 and max(tokens for _, tokens in sizes) <= 40
    long = _answers(engine, [ask("one", [5] * 30, 20)])  # alone, even a request above the limit is answered
    engine.close()
    assert len(long[0].tokens) == 20


def test_a_seed_gives_the_same_answer_in_any_company(engine):
    one = [ask("one", PROMPTS[1], 20, temperature=1.3, top_p=0.9, seed=5)]
    alone = _answers(engine, one)[0].tokens
    company = [ask(n, p, 16, temperature=1.0, seed=i) for i, (n, p) in enumerate(zip(NAMES, PROMPTS, strict=True))]
    assert _answers(engine, company[:2] + one + company[2:])[2].tokens == alone
    others = [_answers(engine, [ask("one", PROMPTS[1], 20, temperature=1.3, seed=s)])[0].tokens for s in (6, 7)]
    assert len({tuple(alone), *map(tuple, others)}) == 3


def test_log_probabilities_are_those_of_the_model(engine, folders):
    from tests.unit.serving import alone

    answer = _answers(engine, [ask("two", PROMPTS[2], 6, temperature=0.8, seed=3, top_logprobs=3)])[0]
    ids = torch.tensor([PROMPTS[2] + answer.tokens])
    with torch.no_grad():
        logits = alone(make_model(make_tokenizer()), folders["two"])(ids).logits[0]
    wanted = logits.log_softmax(-1)[len(PROMPTS[2]) - 1 : -1]
    for score, row in zip(answer.scores, wanted, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()


def test_top_p_keeps_the_fewest_tokens_that_reach_it(engine):
    sure = _answers(engine, [ask("one", PROMPTS[0], 10, temperature=1.0, top_p=1e-6, seed=4)])[0]
    assert sure.tokens == _answers(engine, [ask("one", PROMPTS[0], 10)])[0].tokens


def test_stop_texts_and_stop_tokens_end_an_answer(engine):
    whole = _answers(engine, [ask("two", PROMPTS[2], 30)])[0]
    stop = whole.text[12:15]
    cut = _answers(engine, [ask("two", PROMPTS[2], 30, stop=("no such text", stop))])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.pieces[-1].finish == "stop" and whole.pieces[-1].finish == "length"
    token = whole.tokens[5]
    ended = _answers(engine, [ask("two", PROMPTS[2], 30, stops={token})])[0]
    assert ended.tokens == whole.tokens[: whole.tokens.index(token)]
    assert ended.pieces[-1].finish == "stop" and ended.pieces[-1].tokens == len(ended.tokens)


def test_pieces_are_the_text_of_all_tokens(engine):
    answer = _answers(engine, [ask("one", PROMPTS[3], 40)])[0]
    assert len(answer.pieces) > 3
    assert answer.text == engine.tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_a_deadline_ends_an_answer_and_leaves_the_others(engine):
    late, fine = Answer(), Answer()
    asks = [ask("one", PROMPTS[0], 60, deadline=time.monotonic() + 0.02), ask("two", PROMPTS[0], 30)]
    engine.submit(asks, [late, fine])
    with pytest.raises(TooLate, match=r"serve\.timeout"):
        late.wait()
    assert len(fine.wait().tokens) == 30


def test_a_cancelled_row_leaves_the_batch(engine):
    answer = Answer()
    rows = engine.submit([ask("one", PROMPTS[0], 10_000)], [answer])
    answer.queue.get(timeout=60)
    engine.cancel(rows)
    _answers(engine, [ask("two", PROMPTS[1], 3)])
    assert _idle(engine)


def test_a_full_queue_refuses_and_a_draining_engine_ends_what_it_took(folders):
    engine = _engine(folders, Limits(tokens=4096, rows=1, waiting=2))
    answers = [Answer() for _ in range(3)]
    engine.submit([ask("one", PROMPTS[0], 40)], answers[:1])
    answers[0].queue.get(timeout=60)  # it is in the batch
    engine.submit([ask("one", PROMPTS[1], 5)] * 2, answers[1:])
    with pytest.raises(Busy, match="try again"):
        engine.submit([ask("one", PROMPTS[1], 5)], [Answer()])
    assert engine.drain(60)
    with pytest.raises(Draining):
        engine.submit([ask("one", PROMPTS[1], 5)], [Answer()])
    assert [len(answer.wait().tokens) for answer in answers[1:]] == [5, 5]
    engine.close()
    assert not engine.is_alive


def test_closing_tells_those_who_wait(folders):
    engine = _engine(folders, Limits(tokens=4096, rows=1, waiting=9))
    answers = [Answer(), Answer()]
    engine.submit([ask("one", PROMPTS[0], 10_000)] * 2, answers)
    engine.close()
    for answer in answers:
        with pytest.raises(Draining):
            answer.wait()


def test_an_adapter_that_is_not_finite_fails_its_own_row_only(engine, folders, tmp_path):
    sick = write_adapter(make_model(make_tokenizer()), tmp_path / "sick", 1)
    weights = load_file(sick / "adapter" / "adapter_model.safetensors")
    weights = {k: torch.full_like(v, torch.nan) if k.endswith("U") else v for k, v in weights.items()}
    save_file(weights, sick / "adapter" / "adapter_model.safetensors")
    curlora.seal(sick / "adapter")
    engine.call(lambda: engine.model.load("sick", sick)).result()
    answers = [Answer(), Answer()]
    engine.submit([ask("sick", PROMPTS[1]), ask("one", PROMPTS[1])], answers)
    with pytest.raises(NotFinite, match="sick"):
        answers[0].wait()
    expected = greedy_alone(make_model(make_tokenizer()), folders["one"], PROMPTS[1], 12)
    assert answers[1].wait().tokens == expected
    engine.call(lambda: engine.model.unload("sick")).result()
    assert "sick" not in engine.model.names


def test_a_failing_forward_pass_fails_the_batch_and_not_the_engine(folders):
    engine = _engine(folders)
    answers = [Answer(), Answer()]
    engine.submit([ask("one", PROMPTS[0], 30), ask("ghost", PROMPTS[0])], answers)  # of no such adapter
    for answer in answers:
        with pytest.raises(ValueError, match="ghost"):
            answer.wait()
    assert len(_answers(engine, [ask("one", PROMPTS[0])])[0].tokens) == 12
    engine.close()


def test_adapters_come_and_go_between_tokens_of_others(engine, folders):
    answer = Answer()
    engine.submit([ask("one", PROMPTS[2], 50)], [answer])
    for _ in range(5):
        engine.call(lambda: engine.model.load("late", folders["four"])).result()
        engine.call(lambda: engine.model.unload("late")).result()
    base = make_model(make_tokenizer())
    assert answer.wait().tokens == greedy_alone(base, folders["one"], PROMPTS[2], 50)


@pytest.mark.parametrize("damage", ["truncated", "other base", "no weights", "config"])
@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_does_not_load_leaves_the_model_as_it_was(folders, tmp_path, damage, first):
    base, bad = make_model(make_tokenizer()), tmp_path / "bad"
    write_adapter(make_model(make_tokenizer(), 32) if damage == "other base" else base, bad, 3)
    weights = bad / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config":
        config = json.loads((bad / "adapter" / "adapter_config.json").read_text())
        (bad / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"r": 10_000}))
    engine = _engine({} if first else {"one": folders["one"]})
    with pytest.raises(AdapterError) as caught:
        engine.call(lambda: engine.model.load("bad", bad)).result()
    assert "\n" not in str(caught.value)
    engine.call(lambda: engine.model.load("two", folders["two"])).result()
    found = _answers(engine, [ask("two", PROMPTS[3]), ask(BASE, PROMPTS[3])])
    expected = [greedy_alone(base, folders[name], PROMPTS[3], 12) for name in ("two", BASE)]
    assert [answer.tokens for answer in found] == expected
    assert engine.model.names == {"two"} | ({"one"} - ({"one"} if first else set()))
    engine.close()


def test_other_types_of_adapter_are_refused_with_the_remedy(folders, tmp_path):
    import peft

    base = make_model(make_tokenizer())
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "ia3" / "adapter", save_embedding_layers=False)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    lora_model = peft.get_peft_model(make_model(make_tokenizer()), lora)
    lora_model.save_pretrained(tmp_path / "lora" / "adapter", save_embedding_layers=False)
    model = SharedModel(make_model(make_tokenizer()))
    with pytest.raises(AdapterError, match="--as merged"):
        model.load("x", tmp_path / "ia3")
    model.load("one", folders["one"])
    with pytest.raises(AdapterError, match="of the type lora"):
        model.load("y", tmp_path / "lora")


def test_lora_adapters_share_a_batch_too(tmp_path):
    import peft

    folders, tokenizer = {}, make_tokenizer()
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=32)
        model = peft.get_peft_model(make_model(tokenizer), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_()
        folders[f"l{seed}"] = tmp_path / f"l{seed}"
        model.save_pretrained(folders[f"l{seed}"] / "adapter", save_embedding_layers=False)
    engine = _engine(folders)
    names = ["l1", BASE, "l2"]
    found = _answers(engine, [ask(name, PROMPTS[2]) for name in names])
    engine.close()
    expected = [greedy_alone(make_model(tokenizer), folders.get(name), PROMPTS[2], 12) for name in names]
    assert [answer.tokens for answer in found] == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])
def test_caches_that_cannot_be_joined_are_answered_in_turn(kind):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2}
    if kind == "sliding":
        config = transformers.MistralConfig(
            **sizes, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, sliding_window=6
        )
        base = transformers.MistralForCausalLM(config).eval()
    else:
        config = transformers.MambaConfig(**sizes, state_size=4)
        base = transformers.MambaForCausalLM(config).eval()
    engine = _engine({}, base=base)
    assert engine.batching is (Batching.WAVES if kind == "sliding" else Batching.SINGLE)
    found = _answers(engine, [ask(BASE, prompt, 4 + 3 * i) for i, prompt in enumerate(PROMPTS)])
    engine.close()
    expected = [greedy_alone(base, None, prompt, 4 + 3 * i) for i, prompt in enumerate(PROMPTS)]
    assert [answer.tokens for answer in found] == expected


def test_many_threads_ask_at_once(engine):
    expected = {n: _answers(engine, [ask(n, PROMPTS[2], 9)])[0].tokens for n in ("one", "two", "three", BASE)}
    wrong: list = []

    def client(name: str) -> None:
        for _ in range(4):
            if _answers(engine, [ask(name, PROMPTS[2], 9)])[0].tokens != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=client, args=(name,)) for name in [*expected] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
