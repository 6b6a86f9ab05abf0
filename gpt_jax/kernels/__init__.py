"""Kernels of our own for NVIDIA GPUs, in Pallas; each has a slow reference that tests hold it to.

They go through Pallas's Triton lowering, which JAX 0.11 calls deprecated; its successor, Mosaic
GPU, begins with Hopper. Where it is missing, as on all other hardware, the references are used.
Anywhere they can be interpreted, slowly: for tests.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gpt_jax.errors import UserError

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton: Any = None


def why_not(dtype: Any) -> str | None:
    """Return why the kernels cannot be compiled for what is here and this dtype; None if they can.

    They are made for 16-bit arrays on an NVIDIA GPU of compute capability 8 (Ampere) or later.
    """
    device = jax.devices()[0]
    if triton is None:
        return "this version of JAX has no Triton lowering for Pallas"
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"they are for NVIDIA GPUs, not {device.device_kind}"
    if int(str(device.compute_capability).split(".")[0]) < 8:
        return (
            f"they need compute capability 8, {device.device_kind} has {device.compute_capability}"
        )
    if jnp.dtype(dtype).itemsize != 2:
        return f"they are for bfloat16 and float16, not {jnp.dtype(dtype)}"
    return None


def use(kernels: str, dtype: Any) -> bool:
    """Return whether a config's ``kernels`` means Pallas, here and with products in ``dtype``.

    Raises UserError where it asks for what is not there; a CPU interprets them, slowly: for tests.
    """
    interpreted = triton is not None and jax.devices()[0].platform == "cpu"
    if kernels == "pallas" and not interpreted and (reason := why_not(dtype)):
        raise UserError(f"kernels=pallas: {reason}; use --kernels=auto")
    return kernels == "pallas" or (kernels == "auto" and why_not(dtype) is None)


def compiler_options(config: Any) -> dict[str, Any] | None:
    """Return what XLA is to be told of a network's training step: jit's compiler_options."""
    options: dict[str, Any] = {}
    if use(config.kernels, config.dtype) and not no_gpu():
        # it makes two of q, k and v at once, to copy them apart: 1.2 % of XL's step on an H100
        options["xla_gpu_dot_merger_threshold_mb"] = 0
    if config.matmul_dtype == "float8":
        # XLA's Triton would take the transposes into products of its own, which cannot read them so
        options["xla_gpu_enable_triton_gemm"] = False
    return options or None


def without(model: Any) -> Any:
    """Return the model as it is computed on arrays that several devices share: without kernels.

    XLA cannot cut a kernel of ours as it cuts its own. Raises UserError for kernels=pallas.
    """
    if model.config.kernels == "pallas":
        raise UserError(
            "kernels=pallas is for arrays that are whole on their device: with --fsdp, --tensor or "
            "samples on several devices use --kernels=auto"
        )
    return model.clone(config=replace(model.config, kernels="reference"))


def cudnn_can(q: Array, dropout: float) -> bool:
    """Return whether cuDNN's fused kernel takes these inputs, (B, T, H, D), on this machine."""
    return (
        jax.default_backend() == "gpu"
        and "NVIDIA" in jax.devices()[0].device_kind
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and dropout == 0
    )


def launch(kernel: Any, *, warps: int, stages: int = 1, **arguments: Any) -> Any:
    """Return ``pl.pallas_call`` of a kernel, for ``warps`` of 32 threads a program.

    Interpreted where there is no GPU.
    """
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=no_gpu(), **arguments)


def instruction(name: str, otherwise: Any, *inputs: Array) -> Array:
    """Return what an instruction of the GPU's makes of float32 arrays of one shape, in a kernel.

    For where Triton's own takes several: for the sake of denormals, or as it rounds each product
    before it adds. Where there is no GPU, what a function says ``otherwise``.
    """
    if no_gpu():
        return otherwise(*inputs)
    places = ", ".join(f"${i}" for i in range(1 + len(inputs)))
    return triton.elementwise_inline_asm(
        f"{name} {places};", args=inputs, constraints=",".join(["=f", *"f" * len(inputs)]), pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(inputs[0].shape, jnp.float32)],
    )[0]  # fmt: skip


def fma(x: Array, y: Any, z: Any) -> Array:
    """Return x y + z, rounded once; y and z may be scalars."""
    y, z = (jnp.broadcast_to(jnp.float32(factor), x.shape) for factor in (y, z))
    return instruction("fma.rn.ftz.f32", lambda x, y, z: x * y + z, x, y, z)


def exp2(x: Array) -> Array:
    """Return 2^x within 2 ulp, 0 for denormals."""
    return instruction("ex2.approx.ftz.f32", jnp.exp2, x)


def reciprocal(x: Array) -> Array:
    """Return 1/x within 1 ulp, 0 for denormals."""
    return instruction("rcp.approx.ftz.f32", jnp.reciprocal, x)


def barrier() -> None:
    """Let a program's threads wait for each other: what one has stored all can load.

    Interpreted, a program has no threads.
    """
    if not no_gpu():
        triton.debug_barrier()


def no_gpu() -> bool:
    """Return whether what is traced now will run on something else than a GPU."""
    return jax.default_backend() != "gpu"


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``: the sizes of Triton's arrays."""
    return 1 << max(n - 1, 0).bit_length()
