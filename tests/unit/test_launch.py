"""``Launch``: when a kernel that Triton has compiled is taken again, and when Triton is asked."""

from __future__ import annotations

import pytest
import torch

from awq_core.fragments.launch import Launch


class Function:
    """Stands for a ``triton.jit`` function: notes who was called with what."""

    arg_names = ("x_ptr", "y_ptr", "N", "TILE", "WIDE")

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **named):
            assert named == {"TILE": 64, "WIDE": False, "num_warps": 4}
            self.calls.append((f"triton {grid}", args))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, function: Function) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args: self.function.calls.append((f"compiled {grid}", args))


@pytest.fixture
def function(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return Function()


def test_triton_is_asked_once_and_again_for_what_it_may_compile_anew(function):
    launch = Launch(function, (3,), {"WIDE": False, "TILE": 64}, {"num_warps": 4})
    x, y = torch.zeros(32, dtype=torch.float16), torch.zeros(32, dtype=torch.float16)
    assert x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    triton, compiled = "triton (3, 1, 1)", "compiled (3, 1, 1)"

    def who(*tensors: torch.Tensor) -> str:
        launch(tensors, 7)
        name, args = function.calls[-1]
        wanted = (*tensors, 7) if name == triton else (*tensors, 7, 64, False)  # constants as the function has them
        assert len(args) == len(wanted)
        assert all(a is b for a, b in zip(args, wanted, strict=True))
        return name

    assert [who(x, y), who(x, y), who(y, x)] == [triton, compiled, compiled]
    assert [who(x[1:], y), who(x, y)] == [triton, compiled]  # not at a multiple of 16 bytes
    assert [who(x, y.float()), who(x, y.float()), who(x, y)] == [triton, compiled, triton]  # another type


def test_the_interpreter_compiles_nothing(function, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch = Launch(function, (3, 2), {"WIDE": False, "TILE": 64}, {"num_warps": 4})
    x = torch.zeros(32)
    launch((x, x), 7)
    launch((x, x), 7)
    assert [name for name, _ in function.calls] == ["triton (3, 2, 1)"] * 2
