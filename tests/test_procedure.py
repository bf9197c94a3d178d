"""The driver of procedures: whose turn it is, what moves, and by how much, worked out by hand."""

import pytest
import torch
from torch import nn

from lossary.roles import Procedure, advance


class Pursuit(Procedure):
    """A fox at x runs after a hare at y, minimising (x - y)^2; the hare runs to its home h, minimising (y - h)^2.

    A shadow follows the hare as a moving average. Positions may have leading replicas.
    """

    def __init__(self, fox, hare, order=("fox", "hare")):
        super().__init__()
        self.fox = nn.ParameterList([torch.tensor(fox)])
        self.hare = nn.ParameterList([torch.tensor(hare)])
        self.register_buffer("shadow", torch.tensor(hare))
        self.order = order

    def players(self):
        return {"fox": self.fox, "hare": self.hare}

    def turns(self, step):
        return self.order

    def objective(self, player, batch, *, step, generator=None):
        x, y = self.fox[0], self.hare[0]
        gap = (x - y)[..., None] if player == "fox" else y[..., None] - batch
        return (gap**2).expand(torch.broadcast_shapes(gap.shape, batch.shape))

    def after(self, player, *, step):
        if player == "hare":
            self.shadow.lerp_(self.hare[0].detach(), 0.5)


def optimizers(procedure, lr=0.1):
    return {name: torch.optim.SGD(player.parameters(), lr=lr) for name, player in procedure.players().items()}


HOME = torch.tensor([4.0, 6.0])  # a batch; its mean is the hare's optimum


def test_turns_are_sequential():
    one = Pursuit(0.0, 1.0, order=("fox", "hare"))
    advance(one, HOME, optimizers(one), step=0)
    assert (one.fox[0].item(), one.hare[0].item()) == pytest.approx((0.2, 1.8))  # fox sees 1; hare + 0.2 (5 - 1)
    other = Pursuit(0.0, 1.0, order=("hare", "fox"))
    advance(other, HOME, optimizers(other), step=0)
    assert (other.fox[0].item(), other.hare[0].item()) == pytest.approx((0.36, 1.8))  # fox sees 1.8


def test_a_player_may_have_several_turns_and_is_followed_after_each():
    chase = Pursuit(0.0, 1.0, order=("hare", "fox", "hare"))
    means = advance(chase, HOME, optimizers(chase), step=0)
    assert chase.hare[0].item() == pytest.approx(2.44)  # 1 -> 1.8 -> 2.44
    assert chase.shadow.item() == pytest.approx(1.92)  # 1 -> 1.4 -> 1.92
    assert means["hare"].item() == pytest.approx((2.2**2 + 4.2**2) / 2)  # at its last turn, from 1.8


def test_a_turn_touches_no_other_players_gradient():
    chase = Pursuit(0.0, 1.0, order=("fox",))
    advance(chase, HOME, optimizers(chase), step=0)
    assert chase.hare[0].grad is None
    assert chase.hare[0].item() == 1.0


def test_replicas_move_as_they_would_alone():
    both = Pursuit([0.0, -3.0], [1.0, 2.0])
    means = advance(both, HOME, optimizers(both), step=0)
    for r, (fox, hare) in enumerate([(0.0, 1.0), (-3.0, 2.0)]):
        alone = Pursuit(fox, hare)
        mean = advance(alone, HOME, optimizers(alone), step=0)
        assert both.fox[0][r].item() == pytest.approx(alone.fox[0].item())
        assert both.hare[0][r].item() == pytest.approx(alone.hare[0].item())
        assert means["hare"][r].item() == pytest.approx(mean["hare"].item())


def test_optimizers_that_look_more_than_once_work_too():
    chase = Pursuit(0.0, 1.0, order=("hare",))
    made = {"hare": torch.optim.LBFGS(chase.hare.parameters(), max_iter=5)}
    advance(chase, HOME, made, step=0)
    assert chase.hare[0].item() == pytest.approx(5.0, abs=1e-4)


def test_by_default_everyone_has_one_turn_and_nothing_follows():
    class Plain(Pursuit):
        turns, after = Procedure.turns, Procedure.after

    plain = Plain(0.0, 1.0)
    assert plain.turns(3) == ("fox", "hare")
    advance(plain, HOME, optimizers(plain), step=3)
    assert plain.shadow.item() == 1.0
