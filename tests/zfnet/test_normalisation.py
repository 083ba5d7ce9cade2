"""Contrast normalisation against torch's module and against the formula as AlexNet Sec. 3.3 prints it."""

import pytest
import torch
import torch.nn.functional as F

from zfnet.normalisation import LocalResponseNorm


def printed_formula(a: torch.Tensor, n: int, alpha: float, beta: float, k: float) -> torch.Tensor:
    """AlexNet Sec. 3.3, feature map by feature map: b_i = a_i / (k + alpha * sum_j a_j^2) ^ beta."""
    maps = a.shape[1]
    b = torch.empty_like(a)
    for i in range(maps):
        total = torch.zeros_like(a[:, i])
        for j in range(max(0, i - n // 2), min(maps - 1, i + n // 2) + 1):
            total = total + a[:, j] ** 2
        b[:, i] = a[:, i] / (k + alpha * total) ** beta
    return b


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def responses(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    # Responses in the hundreds, where the sum of squares outweighs k: with small ones any alpha would pass.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(200).to(dtype)


def test_printed_convention_is_the_printed_formula() -> None:
    a = responses(2, 9, 3, 4)
    ours = LocalResponseNorm(convention="printed")(a)
    assert relative_error(ours, printed_formula(a, n=5, alpha=1e-4, beta=0.75, k=2)) < 1e-12


def test_configuration_divides_alpha_by_the_size() -> None:
    a = responses(2, 9, 3, 4)
    assert relative_error(LocalResponseNorm()(a), printed_formula(a, n=5, alpha=1e-4 / 5, beta=0.75, k=2)) < 1e-12


@pytest.mark.parametrize(("convention", "torch_alpha"), [("configuration", 1e-4), ("printed", 5e-4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_torch_forward_and_backward(convention, torch_alpha, dtype, tolerance) -> None:
    a = responses(3, 16, 7, 5, dtype=dtype).requires_grad_()
    upstream = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    ours = LocalResponseNorm(convention=convention)(a)
    reference = F.local_response_norm(a, 5, torch_alpha, 0.75, 2.0)
    assert relative_error(ours, reference) < tolerance
    (our_gradient,) = torch.autograd.grad(ours, a, upstream)
    (reference_gradient,) = torch.autograd.grad(reference, a, upstream)
    assert relative_error(our_gradient, reference_gradient) < tolerance


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("maps", [1, 2, 3, 12])
def test_every_window_equals_torch_even_where_it_is_wider_than_the_maps(size, maps) -> None:
    a = responses(2, maps, 3, 3).requires_grad_()
    ours = LocalResponseNorm(size, alpha=1e-3, beta=0.6, k=1.0)(a)
    reference = F.local_response_norm(a, size, 1e-3, 0.6, 1.0)
    assert relative_error(ours, reference) < 1e-12
    weights = torch.linspace(-1, 1, a.numel(), dtype=a.dtype).reshape(a.shape)
    (our_gradient,) = torch.autograd.grad((ours * weights).sum(), a)
    (reference_gradient,) = torch.autograd.grad((reference * weights).sum(), a)
    assert relative_error(our_gradient, reference_gradient) < 1e-12


def test_gradient_is_the_limit_of_differences() -> None:
    a = responses(1, 6, 2, 2).div(20).requires_grad_()
    assert torch.autograd.gradcheck(LocalResponseNorm(alpha=0.1), (a,))


def test_half_precision_keeps_its_type_and_is_rounded_once() -> None:
    a = responses(2, 8, 3, 3).bfloat16()
    ours = LocalResponseNorm()(a)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, LocalResponseNorm()(a.double()).bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_gradient_summed_in_float32(dtype) -> None:
    a = responses(2, 8, 3, 3).to(dtype)
    exact = a.double().requires_grad_()
    half = a.clone().requires_grad_()
    for x in (exact, half):
        LocalResponseNorm()(x).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2**-7, atol=1e-3)


def test_the_conventions_differ_by_the_size_of_the_window() -> None:
    a = responses(1, 9, 2, 2)
    configured = LocalResponseNorm(5, alpha=5e-4, convention="configuration")
    printed = LocalResponseNorm(5, alpha=1e-4, convention="printed")
    assert torch.equal(configured(a), printed(a))
    assert LocalResponseNorm().convention == "configuration"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_in_memory_changes_nothing(memory_format) -> None:
    a = responses(2, 8, 5, 6, dtype=torch.float32)
    assert torch.equal(LocalResponseNorm()(a.contiguous(memory_format=memory_format)), LocalResponseNorm()(a))


def test_leaves_its_input_alone_and_repeats_itself() -> None:
    a = responses(2, 8, 5, 6, dtype=torch.float32)
    before = a.clone()
    assert torch.equal(LocalResponseNorm()(a), LocalResponseNorm()(a))
    assert torch.equal(a, before)


def test_is_one_operation_to_torch_fx() -> None:
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(LocalResponseNorm()))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]
    a = responses(1, 6, 2, 2)
    assert torch.equal(traced(a), LocalResponseNorm()(a))


def test_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="expected 'configuration'"):
        LocalResponseNorm(convention="paper")
    with pytest.raises(ValueError, match="at least 1 feature map"):
        LocalResponseNorm(size=0)
    with pytest.raises(ValueError, match="images x feature maps"):
        LocalResponseNorm()(torch.zeros(5))
