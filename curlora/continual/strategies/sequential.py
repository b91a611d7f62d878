"""Sequential fine-tuning: keep training the same adapter, protect nothing. The baseline of every method."""

from curlora.continual.strategy import Strategy


class Sequential(Strategy):
    name = "sequential"
    plain_at_first = True
