"""Chats as users bring them, ten rows of each form, and what is learned of each under a ChatML template.

`LEARNED` has the texts with a loss, one per answer, without the end of the turn that every answer has.
"""

import json
from pathlib import Path

# the chat template that Qwen2.5 is published with: tools in the system message, calls and results in XML tags
CHATML = (Path(__file__).parents[1] / "fixtures" / "chatml_with_tools.jinja").read_text()
SPECIAL = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|start_header_id|>")


def _openai(*turns: str, system: str | None = None) -> dict:
    told = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(turns)
    return {"messages": [*told, *({"role": r, "content": t} for r, t in zip(roles, turns, strict=False))]}


OPENAI = [
    _openai("What is the capital of France?", "The capital of France is Paris."),
    _openai("Hi!", "Hello! How can I help?", "Recommend a book.", "Try 'The Dispossessed' by Ursula K. Le Guin."),
    _openai("Translate 'bread' to Danish.", "brød", system="You are a translator. Answer with one word."),
    _openai("2+2?", "4", "And times 3?", "12", "Minus 2?", "10"),
    _openai("Write a haiku about rain.", "Soft rain on the roof\nthe garden drinks in silence\na worm says hello"),
    _openai("Is this code right?\n```python\nprint('hi')\n```", "Yes, it prints `hi`."),
    _openai("Summarise: the meeting moved to 3 pm.", "Meeting: 15:00.", "In German?", "Besprechung: 15 Uhr."),
    _openai("Qu'est-ce qu'un octet ?", "Huit bits.", system="Réponds en français."),
    _openai("你好", "你好！有什么可以帮你？"),
    _openai(
        "Who are you?", "I am a support assistant.", "Close ticket 12.", "Ticket 12 is closed.", system="Be brief."
    ),
]
OPENAI_LEARNED = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in OPENAI]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ORDER = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Looks an order up.",
        "parameters": {"type": "object", "properties": {"id": {"type": "integer"}, "open": {"type": "boolean"}}},
    },
}


def _call(name: str, text: bool = False, content: str | None = None, **arguments) -> dict:
    """A message of the assistant that calls a tool; `text`: with its arguments as JSON text, as OpenAI writes them."""
    function = {"name": name, "arguments": json.dumps(arguments) if text else arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def _said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _written(name: str, arguments: dict) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


_PARIS = _written("get_weather", {"city": "Paris"})
TOOLS = [
    {
        "messages": [
            _said("user", "Weather in Paris?"),
            _call("get_weather", city="Paris"),
            _said("tool", '{"celsius": 18}'),
            _said("assistant", "It is 18 °C in Paris."),
        ],
        "tools": [WEATHER],
    },
    {
        "messages": [_said("user", "Weather in Oslo?"), _call("get_weather", text=True, city="Oslo")],
        "tools": [WEATHER],
    },
    {
        "messages": [
            _said("user", "Where is order 7?"),
            _call("find_order", id=7),
            _said("tool", "shipped"),
            _said("assistant", "It has been shipped."),
        ],
        "tools": [WEATHER, ORDER],
    },
    {"messages": [_said("user", "Thanks!"), _said("assistant", "You're welcome.")], "tools": [WEATHER]},
    {
        "messages": [
            _said("system", "Use tools."),
            _said("user", "Order 9, still open?"),
            _call("find_order", id=9, open=True),
        ],
        "tools": [ORDER],
    },
    {
        "messages": [
            _said("user", "Paris or Rome, where is it warmer?"),
            _call("get_weather", city="Paris"),
            _said("tool", "18"),
            _call("get_weather", city="Rome"),
            _said("tool", "24"),
            _said("assistant", "Rome."),
        ],
        "tools": [WEATHER],
    },
    {
        "messages": [_said("user", "Look order 3 up."), _call("find_order", content="One moment.", id=3)],
        "tools": [ORDER],
    },
    {"messages": [_said("user", "Say hi."), _said("assistant", "Hi.")], "tools": []},
    {"messages": [_said("user", "No tools here?"), _said("assistant", "None.")], "tools": None},
    {
        "messages": [
            _said("user", "Order 1?"),
            _call("find_order", id=1),
            _said("tool", ""),
            _said("assistant", "I found nothing. Which year?"),
            _said("user", "2024"),
            _said("assistant", "Thank you."),
        ],
        "tools": [ORDER],
    },
]
TOOLS_LEARNED = [
    [_PARIS, "It is 18 °C in Paris."],
    [_written("get_weather", {"city": "Oslo"})],
    [_written("find_order", {"id": 7}), "It has been shipped."],
    ["You're welcome."],
    [_written("find_order", {"id": 9, "open": True})],
    [_PARIS, _written("get_weather", {"city": "Rome"}), "Rome."],
    ["One moment.\n" + _written("find_order", {"id": 3})],
    ["Hi."],
    ["None."],
    [_written("find_order", {"id": 1}), "I found nothing. Which year?", "Thank you."],
]


def _sharegpt(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


SHAREGPT = [
    _sharegpt(("human", "How do I boil an egg?"), ("gpt", "Seven minutes in boiling water.")),
    _sharegpt(("system", "You are a pirate."), ("human", "Hello"), ("gpt", "Ahoy!")),
    _sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")),
    _sharegpt(("gpt", "Welcome to the shop."), ("human", "A tea, please."), ("gpt", "Green or black?")),
    _sharegpt(("user", "Sort 3 1 2"), ("assistant", "1 2 3")),
    _sharegpt(
        ("human", "Weather in Paris?"),
        ("function_call", '{"name": "get_weather", "arguments": {"city": "Paris"}}'),
        ("observation", "18"),
        ("gpt", "18 degrees."),
    ),
    _sharegpt(("human", "Write SQL for all users."), ("gpt", "SELECT * FROM users;")),
    _sharegpt(("human", "Explain <b>bold</b>."), ("gpt", "It marks text as bold.")),
    _sharegpt(("human", "¿Qué hora es?"), ("gpt", "No lo sé."), ("human", "Gracias"), ("gpt", "De nada.")),
    _sharegpt(("human", "Continue: one, two,"), ("gpt", " three, four")),
]
SHAREGPT_LEARNED = [
    ["Seven minutes in boiling water."],
    ["Ahoy!"],
    ["b", "d"],
    ["Green or black?"],  # nobody asked for the welcome
    ["1 2 3"],
    [_PARIS, "18 degrees."],
    ["SELECT * FROM users;"],
    ["It marks text as bold."],
    ["No lo sé.", "De nada."],
    [" three, four"],
]


def _alpaca(instruction: str, more: str | None, output: str) -> dict:
    return {"instruction": instruction, "input": more, "output": output}


ALPACA = [
    _alpaca("Give three tips for staying healthy.", "", "1. Sleep. 2. Walk. 3. Eat greens."),
    _alpaca("Classify the sentiment.", "I loved it", "positive"),
    _alpaca("Rewrite in the past tense.", "She goes home.", "She went home."),
    _alpaca("What are the three primary colours?", None, "Red, blue and yellow."),
    _alpaca("Convert to JSON.", "name: Ada, age: 36", '{"name": "Ada", "age": 36}'),
    _alpaca("Name a mammal that lays eggs.", "", "The platypus."),
    _alpaca("Sum the numbers.", "4, 8, 15", "27"),
    _alpaca("Write a title.", "A paper about forgetting\nin neural networks", "What Networks Forget"),
    _alpaca("Spell 'necessary'.", "", "n-e-c-e-s-s-a-r-y"),
    _alpaca("Complete.", "Roses are red,", "violets are blue."),
]
ALPACA_LEARNED = [[row["output"]] for row in ALPACA]

PROMPTS = [
    {"question": row["instruction"] + (f" {row['input']}" if row["input"] else ""), "answer": row["output"]}
    for row in ALPACA
]

FORMS = {  # fields of the task, rows, what is learned
    "openai": ({"messages": "messages"}, OPENAI, OPENAI_LEARNED),
    "openai-last": ({"messages": "messages", "learn": "last"}, OPENAI, [said[-1:] for said in OPENAI_LEARNED]),
    "tools": ({"messages": "messages", "tools": "tools"}, TOOLS, TOOLS_LEARNED),
    "sharegpt": ({"format": "sharegpt"}, SHAREGPT, SHAREGPT_LEARNED),
    "alpaca": ({"format": "alpaca"}, ALPACA, ALPACA_LEARNED),
    "prompt": ({"prompt": "{question}", "completion": "{answer}", "chat": True}, PROMPTS, ALPACA_LEARNED),
}
