"""Tunings whose outcome is known."""

from scripts.inference.confidence import ConfidentInferer


def winning(monkeypatch, by):
    """Let every judgement of tuned weights be so much better than that of the weights before."""
    plain = ConfidentInferer.tested

    def tested(self, case, network=None):
        found = plain(self, case, None)
        if network is not None:
            for values in found.dice.values():
                values.update({value: dice + by for value, dice in values.items()})
        return found

    monkeypatch.setattr(ConfidentInferer, "tested", tested)
