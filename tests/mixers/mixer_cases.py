"""Every kind of mixer at the sizes its contract is checked at, by the name of its class."""

from dataclasses import dataclass, field

from patternsearch.assignment import Mixer
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.block_diagonal import BlockDiagonal
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.diagonal import Diagonal
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.sizes import Sizes


@dataclass(frozen=True)
class Case:
    """A mixer where it stands: from `inp` positions with d_in channels to `out` with d_out."""

    mixer: Mixer
    inp: tuple[int, ...]
    out: tuple[int, ...] = ()
    d_in: int = 6
    d_out: int = 4
    causal: bool = False
    at: Sizes = field(init=False)

    def __post_init__(self) -> None:
        sizes = Sizes(
            out=self.out or self.inp,
            inp=self.inp,
            d_in=self.d_in,
            d_out=self.d_out,
            causal=self.causal,
        )
        object.__setattr__(self, "at", sizes)


QKV = {name: Dense() for name in ("query", "key", "value")}
OUT = {"output": LowRank(rank=2)}
VALUE = {"value": Dense()}
TWO_KEYS = QKV | {"key2": Dense(), "value2": Kronecker()}
PAST = Banded(lower="full", upper=0)
AROUND = Banded(lower=2, upper=1, tie="circulant")
BAND_2D = Banded(lower=(1, 2), upper=(0, 1))
BAND_3D = Banded(lower=(1, 0, 1), upper=(1, 1, 0))


def entries(entry) -> Banded:
    return Banded(lower=(2, 0), upper=(1, 1), dilation=(1, 2), entry=entry)


CASES = {
    "LinearMixer": [
        Case(Mixer(positions=Banded(lower=2, upper=0, entry=Dense())), (7,), causal=True),
        Case(Mixer(positions=entries(Dense())), (4, 5)),
        Case(Mixer(positions=entries(Diagonal())), (4, 5), d_in=4),
        Case(Mixer(positions=entries(BlockDiagonal(blocks=2))), (4, 5)),
        Case(Mixer(positions=entries(LowRank(rank=2))), (4, 6), (2, 3)),
        Case(Mixer(positions=BAND_3D, heads=2, maps=VALUE | OUT), (3, 2, 4)),
        Case(Mixer(positions=Dense(), heads=4, maps=VALUE, bias=False), (2, 3)),
        Case(Mixer(positions=Semiseparable(), heads=2, maps=VALUE), (6,), causal=True),
        Case(Mixer(positions=AROUND, heads=2, maps=VALUE), (8,)),
    ],
    "GatedMixer": [
        Case(Mixer(positions=PAST, order=2, maps=VALUE | {"gate": Dense()}), (6,), causal=True),
        Case(
            Mixer(
                positions=BAND_2D,
                order=2,
                heads=2,
                maps=VALUE | {"gate": LowRank(rank=1)} | OUT,
                gate="silu",
            ),
            (4, 6),
            (2, 3),
        ),
        Case(
            Mixer(positions=BAND_3D, order=2, maps=VALUE | {"gate": Dense()}, gate="tanh"),
            (2, 3, 2),
        ),
    ],
    "RecurrentMixer": [
        Case(
            Mixer(positions=Semiseparable(), order=2, maps=VALUE | {"decay": Dense()}),
            (7,),
            causal=True,
        ),
        Case(
            Mixer(
                positions=Semiseparable(two_sided=True),
                order=2,
                maps=VALUE | {"decay": Dense(), "gate": Dense()} | OUT,
                gate="silu",
            ),
            (3, 4),
        ),
        Case(
            Mixer(
                positions=Semiseparable(),
                order=2,
                maps=VALUE | {"decay": Dense(), "gate": Dense()},
            ),
            (4, 6),
            (2, 3),
        ),
        Case(
            Mixer(positions=Semiseparable(entry=Dense()), order=2, maps=VALUE, gate="tanh"),
            (6,),
            causal=True,
        ),
        Case(
            Mixer(positions=Semiseparable(entry=Diagonal()), order=2, maps=VALUE, gate="relu"),
            (2, 3),
        ),
    ],
    "AttentionMixer": [
        Case(Mixer(positions=PAST, order=3, heads=2, maps=QKV), (7,), causal=True),
        Case(Mixer(positions=Banded(lower=1, upper=1, dilation=2), order=3, maps=QKV | OUT), (7,)),
        Case(Mixer(positions=Dense(), order=3, heads=2, maps=QKV, encoding="rotary"), (3, 2)),
        Case(Mixer(positions=BAND_2D, order=3, heads=2, maps=QKV), (4, 6), (2, 3)),
        Case(Mixer(positions=BAND_3D, order=3, heads=2, maps=QKV, encoding="rotary"), (2, 3, 2)),
        Case(Mixer(positions=AROUND, order=3, heads=2, maps=QKV), (8,)),
    ],
    "AxialMixer": [
        Case(Mixer(positions=Kronecker(), order=3, heads=2, maps=QKV), (3, 4)),
        Case(Mixer(positions=Kronecker(outer_first=False), order=3, maps=QKV | OUT), (2, 3, 4)),
        Case(Mixer(positions=Kronecker(), order=3, heads=2, maps=QKV), (4, 6), (2, 3)),
        Case(Mixer(positions=Kronecker(modes=2), order=3, maps=QKV, encoding="rotary"), (12,)),
    ],
    "LinearAttentionMixer": [
        Case(
            Mixer(positions=Semiseparable(state=3), order=3, heads=2, maps=QKV), (7,), causal=True
        ),
        Case(
            Mixer(
                positions=Semiseparable(state=2, normalise=False),
                order=3,
                heads=2,
                maps=QKV | {"decay": Dense()} | OUT,
            ),
            (7,),
            causal=True,
        ),
        Case(
            Mixer(
                positions=Semiseparable(state=2, two_sided=True),
                order=3,
                maps=QKV | {"decay": Dense()},
            ),
            (2, 4),
        ),
        Case(Mixer(positions=Semiseparable(state=4), order=3, maps=QKV), (4, 6), (2, 3)),
    ],
    "LowRankAttentionMixer": [
        Case(Mixer(positions=LowRank(rank=3), order=3, heads=2, maps=QKV), (7,)),
        Case(Mixer(positions=LowRank(rank=0.5), order=3, maps=QKV | OUT), (4, 4), (2, 2)),
        Case(Mixer(positions=LowRank(rank=2), order=3, heads=4, maps=QKV), (2, 2, 3)),
    ],
    "SumMixer": [
        Case(
            Mixer(
                positions=Banded(lower=2, upper=0, entry=Dense()),
                plus=Mixer(positions=PAST, order=3, heads=2, maps=QKV),
            ),
            (7,),
            causal=True,
        ),
        Case(
            Mixer(
                positions=entries(LowRank(rank=2)),
                plus=Mixer(
                    positions=Dense(),
                    order=3,
                    heads=2,
                    maps=QKV,
                    plus=Mixer(positions=Semiseparable(two_sided=True), heads=2, maps=VALUE),
                ),
            ),
            (4, 6),
            (2, 3),
        ),
    ],
    "TwoKeyMixer": [
        Case(Mixer(positions=Dense(), order=4, heads=2, maps=TWO_KEYS), (5,)),
        Case(Mixer(positions=PAST, order=4, maps=TWO_KEYS | OUT), (5,), causal=True),
        Case(Mixer(positions=BAND_2D, order=4, heads=2, maps=TWO_KEYS), (2, 6), (1, 3)),
        Case(Mixer(positions=BAND_3D, order=4, maps=TWO_KEYS, encoding="rotary"), (2, 2, 2)),
        Case(Mixer(positions=AROUND, order=4, maps=TWO_KEYS), (6,)),
    ],
}
