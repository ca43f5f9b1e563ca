"""`titans doctor`: it says what is here, and notices an implementation that computes something else."""

import pytest
import torch

from titans.cli import doctor
from titans.cli.main import main
from titans.testing import evaluate


def test_this_installation_passes(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "transformers" in printed
    assert "FAILED" not in printed


def test_a_wrong_gradient_fails_with_code_1(capsys, monkeypatch):
    """An error of one part in a thousand in one gradient must not pass."""

    def slightly_wrong(inputs, impl):
        results = evaluate(inputs, impl)
        if impl != "reference":
            results["grad theta"] = results["grad theta"] * 1.001
        return results

    monkeypatch.setattr(doctor, "evaluate", slightly_wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "checks failed" in printed


def test_an_implementation_that_raises_or_gives_nan_fails(monkeypatch):
    def raises(inputs, impl):
        if impl != "reference":
            raise RuntimeError("no kernel")
        return evaluate(inputs, impl)

    def gives_nan(inputs, impl):
        results = evaluate(inputs, impl)
        if impl != "reference":
            results["output"] = results["output"] * float("nan")
        return results

    for broken in (raises, gives_nan):
        monkeypatch.setattr(doctor, "evaluate", broken)
        assert not any(check.passed for check in doctor.self_check(torch.device("cpu")))


def test_the_kernels_are_checked_where_auto_runs_them(monkeypatch):
    """Without a GPU "chunked" stands for them: right it passes in all six cases, 3 % off it fails in all."""
    device = torch.device("cpu")
    assert not list(doctor.kernel_check(device)), "auto does not run the kernels on a CPU"
    monkeypatch.setattr(doctor, "resolve_implementation", lambda *_: "triton")
    for factor, passes in ((1.0, True), (1.03, False)):

        def kernels(inputs, impl, factor=factor):
            results = evaluate(inputs, "chunked")  # for the reference, too: its token loop takes seconds
            if impl == "triton":
                results["grad k"] = results["grad k"] * factor
            return results

        monkeypatch.setattr(doctor, "evaluate", kernels)
        checks = list(doctor.kernel_check(device))
        assert len(checks) == 6
        assert all(check.passed == passes for check in checks)


@pytest.mark.gpu
def test_the_kernels_pass():
    checks = list(doctor.kernel_check(torch.device("cuda")))
    assert len(checks) == 6
    assert not [check for check in checks if not check.passed]
