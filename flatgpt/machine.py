"""
What this machine can do: its device, its precision, and the special kernels of torch that work on it, each found out by
a trial. runtime.setup() asks these functions.
"""

import contextlib
import ctypes
import os
import sys
import warnings
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flatgpt.errors import UsageError, first_line

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def works(trial: Callable, asked_for: str | None = None) -> bool:
    """Whether a trial of a special kernel succeeds on this machine: it raises nothing and returns true. asked_for: a
    name of the kernel, if the user has asked for it; then a failure prints a line on stderr."""
    reason = 'wrong numbers'
    try:
        with warnings.catch_warnings(action='ignore'):
            if trial():
                return True
    except Exception as error:   # each library raises its own kind
        reason = f'{type(error).__name__}: {first_line(error)}'
    if asked_for and int(os.environ.get('LOCAL_RANK', 0)) == 0:   # once per machine
        print(f'{asked_for} does not work here ({reason}), continuing without it', file=sys.stderr)
    return False


def pick_device(name: str, local_rank: int | None) -> torch.device:
    """The device of a name; local_rank is the GPU of this process if it is one of several. Raises UsageError."""
    mps = (local_rank is None and torch.backends.mps.is_available()   # several processes cannot share an Apple GPU
           and works(lambda: torch.ones(4, device='mps').square().sum().item() == 4))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == 'auto':
        name = 'cuda' if gpus else 'mps' if mps else 'cpu'
    device_type, _, index = name.partition(':')
    if device_type not in ('cuda', 'mps', 'cpu') or (index and not index.isdecimal()):
        raise UsageError(f"device={name!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    if device_type == 'cuda':
        index = local_rank if local_rank is not None else int(index or 0)
        if index >= gpus:
            raise UsageError(f"device='cuda:{index}': torch {torch.__version__} finds {gpus} GPUs; try device='auto'")
        return torch.device('cuda', index)
    if device_type == 'mps' and not mps:
        raise UsageError("device='mps': torch finds no Apple GPU that works here for one process; try device='auto'")
    return torch.device(device_type)


def pick_dtype(name: str, device: torch.device, decoding=False) -> torch.dtype:
    """The torch.dtype of a name; 'auto' is bfloat16 where the hardware multiplies it natively, else float32. decoding:
    whether quantize.prepare() stores the matrices; then 'auto' is float32 on a CPU with a kernel for float16."""
    if name not in ('auto', *DTYPES):
        raise UsageError(f"dtype={name!r}: expected 'auto', {', '.join(map(repr, DTYPES))}")
    if name != 'auto':
        return DTYPES[name]
    if device.type == 'cuda':
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif decoding and device.type == 'cpu' and 'fbgemm' in torch.backends.quantized.supported_engines:
        native = False
    else:
        native = device.type == 'cpu' and cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (AVX512-BF16, AMX, ARM's BF16) and torch may use them:
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can forbid it. Nothing is timed, so that a resumed run gets the same."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False   # other products in bfloat16 are slow
    can = torch.cpu.get_capabilities()
    emulated = os.environ.get('ONEDNN_MAX_CPU_ISA', '').upper() in ('AVX512_CORE', 'AVX512_CORE_VNNI')
    allowed = torch.backends.cpu.get_cpu_capability() == 'AVX512' and not emulated
    return bool(can.get('bf16') or (allowed and (can.get('avx512_bf16') or can.get('amx_bf16'))))   # 'bf16': of ARM


def pick_compile(choice: str | bool, device: torch.device) -> bool:
    """Whether to use torch.compile, if a trial works; 'auto' does not on a CPU, where compiling needs half a minute."""
    if choice not in (True, False, 'auto'):
        raise UsageError(f"compile={choice!r}: expected 'auto', True or False")
    if not choice or (choice == 'auto' and device.type != 'cuda'):
        return False
    zeros = torch.zeros(8, device=device)   # the trial fails without a C++ compiler, without Triton, on an old GPU
    return works(lambda: torch.compile(lambda x: x + 1)(zeros).sum().item() == 8, 'torch.compile')


class SkipInit(TorchFunctionMode):
    """A context in which weights are not drawn at random. On torch.device('meta'), where they have no numbers, drawing
    them would still import torch's compiler, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == 'normal_':   # of a tensor, or of torch.nn.init
            return args[0] if args else kwargs['tensor']
        return function(*args, **(kwargs or {}))


def set_compile_cache():
    """Let torch.compile keep its code in ~/.cache/flatgpt, so that a start after a reboot needs seconds, not a minute.
    Each kind of CPU has its own folder: torch would load code for AVX-512 where it uses AVX2, with wrong numbers."""
    can = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    cpu = f'{torch.backends.cpu.get_cpu_capability()}-{zlib.crc32(repr(can).encode()):08x}'
    torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag or cpu
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if os.name == 'posix' and os.access(caches, os.W_OK):
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(caches, 'flatgpt', 'compiled', cpu))


def use_expandable_segments():
    """Let the GPU's allocator grow its segments, which wastes less memory to fragmentation, unless the environment
    configures it; the variable itself is read when torch is imported, which is too early to set it here."""
    chosen = {'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'} & os.environ.keys()
    if sys.platform == 'linux' and not chosen:
        works(lambda: torch._C._accelerator_setAllocatorSettings('expandable_segments:True') is None)


kernel_priority = contextlib.ExitStack()   # holds the sdpa_kernel() context for as long as the process lives


def prioritize_attention_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Let torch's fused attention try the fastest kernel first, and return its name. On data-centre GPUs since Hopper
    that is cuDNN's, on others FlashAttention 2. Kernels that fail a trial are not used."""
    fastest = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if torch.cuda.get_device_capability(device) in ((9, 0), (10, 0), (10, 3)):
        fastest[:2] = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    kernel_priority.close()
    order = [kernel for kernel in fastest if attention_kernel_works(kernel, device, dtype)] + [SDPBackend.MATH]
    kernel_priority.enter_context(sdpa_kernel(order, set_priority=True))
    return order[0].name.removesuffix('_ATTENTION').lower()


def attention_kernel_works(kernel: SDPBackend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an attention kernel of torch gives the output and the gradient of the plain one."""
    def results(kernel):
        q = torch.arange(2 * 64 * 64, device=device).sin().view(1, 2, 64, 64).to(dtype).requires_grad_()  # (B, H, T, D)
        with sdpa_kernel(kernel):
            y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            y.square().sum().backward()   # whose gradient lies as y does
        return torch.stack((y.detach(), q.grad)).float()

    return works(lambda: torch.allclose(results(kernel), results(SDPBackend.MATH), atol=0.05, rtol=0.05))


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for the next step; returns whether it does. By default it returns each large
    tensor to the kernel and asks for new pages: a fifth of the time of a small training step."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # malloc.h
    mallopt = lambda *options: ctypes.CDLL(None).mallopt(*options) == 1   # other C libraries do not have it
    return works(lambda: mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; to a GPU from pinned memory, so that the copy runs in the background."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
