"""Text that a model writes by itself: what it depends on, and what it is a sample of."""

import torch

from pipelines.distributed.world import World
from pipelines.evaluation.sampling import BATCH, sample_text

ALONE = World(0, 1, torch.device("cpu"))


def test_rows_are_what_was_asked_for_and_repeat_with_the_seed(model):
    rows = sample_text(model, BATCH + 3, 9, 1, 5, ALONE)
    assert [len(row) for row in rows] == [9] * (BATCH + 3)
    assert {row[0] for row in rows} == {1}
    assert rows == sample_text(model, BATCH + 3, 9, 1, 5, ALONE)
    assert rows != sample_text(model, BATCH + 3, 9, 1, 6, ALONE)
    assert len(set(rows)) > BATCH


def test_forbidden_tokens_are_never_written(model):
    forbidden = list(range(3, 290))
    rows = sample_text(model, 8, 12, 1, 0, ALONE, forbidden)
    assert not {token for row in rows for token in row} & set(forbidden)


def test_second_tokens_come_in_the_models_own_proportions(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # away from the uniform distribution
        wanted = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
    rows = sample_text(model, 2000, 2, 1, 0, ALONE)
    counts = torch.bincount(torch.tensor([row[1] for row in rows]), minlength=len(wanted))
    likely = wanted.topk(5)
    assert likely.values.sum() > 0.05
    error = (wanted * (1 - wanted) / 2000).sqrt()
    assert ((counts / 2000 - wanted).abs() <= 4.5 * error + 1e-9)[likely.indices].all()


def test_every_token_is_computed_once(model):
    """Without the cache of keys and values every pass would run over all tokens so far."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    sample_text(model, 2, 9, 1, 5, ALONE)
    hook.remove()
    assert seen == [1] * 8
