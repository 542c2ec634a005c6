"""
The machine: device, precision, torch.compile, processes, peak FLOP/s. Only this file names accelerators and the
environment variables of torchrun; all others ask the Runtime that setup() returns.
"""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from flatgpt.errors import UsageError, UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
PARALLEL = ('ddp', 'fsdp')
DEEP = 24       # models of more layers are compiled block by block
TIMEOUT = 600   # seconds that a process waits for another before it gives up; DIST_TIMEOUT in the environment

# Peak of dense bfloat16 matrix products in TFLOP/s, by a part of the device's name (the longest that matches), from the
# data sheets
PEAK_TFLOPS = {
    'A100': 312, 'A800': 312, 'A10': 125, 'A30': 165, 'A40': 150, 'L4': 121, 'L40': 181, 'L40S': 362,
    'H100': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H800': 989, 'H200': 989, 'GH200': 989, 'H20': 148,
    'B100': 1750, 'B200': 2250, 'GB200': 2500, 'B300': 2250,
    'RTX 3090': 71, 'RTX 4090': 165, 'RTX 5090': 210, 'RTX A6000': 155, 'RTX 6000 Ada': 364,
}


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype      # of matrix products and activations; weights in training stay in float32
    compile: bool
    rank: int               # of this process among world_size
    world_size: int
    attention: str | None = None   # torch's fused attention kernel of first choice, on a GPU

    @property
    def master(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def say(self, text: str):
        """Print a line on stdout, in the master process only."""
        if self.master:
            print(text, flush=True)

    def notice(self, text: str):
        """Print a line on stderr, in the master process only."""
        if self.master:
            print(text, file=sys.stderr, flush=True)

    def autocast(self):
        """A context in which the matrix products of a forward pass run in dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self):
        """The loss scaler that float16 needs (Micikevicius et al., 2018); for other types it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def compile_model(self, model: nn.Module, parallel='ddp'):
        """Compile a model in place; its parameters keep their names. A deep model, or one that FSDP shards, is compiled
        block by block: the code of one block serves all of them, so depth does not add compilation time."""
        if model.config.n_layer <= DEEP and (parallel == 'ddp' or self.world_size == 1):
            model.compile()
            return
        for block in model.transformer.h:
            block.compile()
        # so that the logits of all positions need no memory in float32
        model.logits_and_loss = torch.compile(model.logits_and_loss)

    def compile_step(self, model: nn.Module):
        """Compile the decoding of one token: into a CUDA graph on a GPU, with packed weights on a CPU. Prompts are not
        compiled. If the first call fails, decoding continues without compilation."""
        eager = model.next_logits
        if self.device.type == 'cuda':
            fast = torch.compile(eager, mode='reduce-overhead')
        else:
            fast = torch.compile(eager, options={'freezing': True})
        trials = []   # the result of the first call, which is repeated: the token goes into the same column again

        def next_logits(idx, kv_cache):
            if kv_cache.length == 0 or idx.size(1) > 1:
                return eager(idx, kv_cache)
            if not trials:
                trials.append(works(lambda: fast(idx, kv_cache) is not None, 'torch.compile'))
            return fast(idx, kv_cache) if trials[0] else eager(idx, kv_cache)

        model.next_logits = next_logits

    def wrap(self, model: nn.Module, parallel='ddp', changing=False) -> nn.Module:
        """The module to call in training: with several processes, one that averages gradients over them.

        'ddp' replicates the model in each process (Li et al., 2020). 'fsdp' shards parameters, gradients and optimizer
        state, and gathers a block only while it is needed (ZeRO stage 3, Rajbhandari et al., 2020): model changes in
        place, its parameters become DTensors, its residual stream is in dtype too.
        changing: whether parameters will be frozen or released later, which 'ddp' alone supports.
        """
        if self.world_size == 1:
            return model
        if parallel == 'ddp':
            return DistributedDataParallel(model, [self.device] if self.device.type == 'cuda' else None,
                                           find_unused_parameters=changing)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # its import needs half a second

        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)   # of gradients
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    def average_gradients(self, model: nn.Module, on: bool):
        """A context that switches the averaging of gradients on or off for a forward and backward pass; only the last
        micro-batch of a step needs it."""
        if hasattr(model, 'set_requires_gradient_sync'):   # FSDP
            model.set_requires_gradient_sync(on)
        elif self.world_size > 1 and not on:
            return model.no_sync()
        return contextlib.nullcontext()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm, over all parameters and processes, is at most max_norm. Returns the
        norm before."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes; the tensor becomes the sum."""
        return self.sum(tensor) / self.world_size   # gloo has no average

    def mean_number(self, number: float) -> float:
        """The mean of a number over all processes."""
        return self.mean(torch.tensor(number, dtype=torch.float64)).item()

    def loss_denominators(self, targets: Tensor) -> Tensor:
        """What to divide the mean losses of the micro-batches of a step by, (M,), so that their sum over all processes
        is the mean over all targets, (M, B, T), that are not -1."""
        n = (targets != -1).sum(dim=(1, 2)).float()
        return self.mean(n.sum()).clamp(min=1 / self.world_size) / n.clamp(min=1)   # there may be none at all

    def any_process(self, flag: bool) -> bool:
        """Whether flag is true in any process. Between CPUs, so that no GPU is waited for."""
        return flag if self.world_size == 1 else self.mean(torch.tensor(float(flag))).item() > 0

    def same_everywhere(self, number: float) -> bool:
        """Whether a number is the same in all processes."""
        return not self.any_process(self.mean_number(number) != number)

    def gather_state(self, state):
        """A copy on the CPU of a nested state, for the master process; None for the others. Every process must call it,
        because sharded tensors are gathered."""
        copies = {}   # by the id of the tensor: tied weights stay one tensor

        def copy(tensor):
            if id(tensor) not in copies:
                full = full_tensor(tensor.detach())
                copies[id(tensor)] = torch.empty_like(full, device='cpu').copy_(full) if self.master else None
            return copies[id(tensor)]

        state = tree_map_only(Tensor, copy, state)
        return state if self.master else None

    def reseed(self, seed: int, step: int):
        """Make dropout a function of (seed, step, rank), so that a resumed run drops the same activations."""
        torch.manual_seed(((seed * 1_000_003 + step) * self.world_size + self.rank) % 2**64)

    def sync(self):
        """Wait until the device has finished its work, before a clock is read."""
        if self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize()

    def peak_memory(self) -> int | None:
        """The most memory used so far, in bytes: of the device, or on a CPU of the process; None if unknown."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == 'mps':
            return torch.mps.driver_allocated_memory()
        # on Linux, where getrusage() also counts the process before it ran this program
        with contextlib.suppress(OSError), open('/proc/self/status') as f:
            if own := re.search(r'VmHWM:\s*(\d+) kB', f.read()):
                return int(own[1]) * 1024
        with contextlib.suppress(ImportError):   # Windows
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of this device in dtype: from a table, on a CPU measured; None if unknown."""
        if self.device.type == 'cpu':
            return self.measured_flops()
        name = self.device_name()
        known = max((part for part in PEAK_TFLOPS if re.search(rf'\b{part}\b', name)), key=len, default=None)
        # TensorFloat-32 runs at half the rate of bfloat16
        return PEAK_TFLOPS[known] * 1e12 / (2 if self.dtype == torch.float32 else 1) if known else None

    def measured_flops(self) -> float:
        """FLOP/s of the fastest of a few square matrix products in dtype."""
        cpu = self.device.type == 'cpu'
        dtype = torch.float32 if cpu and self.dtype == torch.float16 else self.dtype
        slow = cpu and dtype == torch.bfloat16 and not cpu_multiplies_bfloat16()   # 200 times slower than float32
        n = 256 if slow else 1024 if cpu else 8192
        a, b = torch.randn(2, n, n, device=self.device).to(dtype)
        return 2 * n**3 / self.best_time(lambda: a @ b)

    def measured_bandwidth(self) -> float:
        """Bytes per second at which memory is read, by sums of more than the caches hold."""
        x = torch.ones(2**27 if self.device.type == 'cpu' else 2**29, device=self.device, dtype=torch.bfloat16)
        return x.nbytes / min(self.best_time(x.sum), self.best_time(x.view(torch.float32).sum))

    def best_time(self, work: Callable, times=10) -> float:
        """Seconds of the fastest of a few calls."""
        best = math.inf
        for _ in range(times):
            self.sync()
            t0 = time.perf_counter()
            work()
            self.sync()
            best = min(best, time.perf_counter() - t0)
        return best

    def device_name(self) -> str:
        """The name of the GPU, or the architecture of the CPU and the number of threads."""
        if self.device.type == 'cuda':
            return torch.cuda.get_device_name(self.device)
        threads = f', {torch.get_num_threads()} threads' if self.device.type == 'cpu' else ''
        return platform.machine() + threads

    def describe(self) -> str:
        """The machine in one line, to paste into a bug report."""
        kernel = f'{self.attention} attention, ' if self.attention else ''
        compiled = 'compiled' if self.compile else 'not compiled'
        processes = '1 process' if self.world_size == 1 else f'{self.world_size} processes'
        return (f'{self.device} ({self.device_name()}), {str(self.dtype)[6:]}, {kernel}{compiled}, {processes}, '
                f'torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}')

    def close(self, status=0):
        """End this process with an exit status. One of several exits at once, without the interpreter's clean-up, in
        which communication threads that still hold a tensor would abort it."""
        if self.world_size > 1:
            dist.destroy_process_group()
            exit_now(status)
        if status:
            sys.exit(status)


def setup(device='auto', dtype='auto', compile: str | bool = 'auto', seed=0, training=False,
          earlier: tuple | None = None) -> Runtime:
    """Choose the machine, prepare this process for it, and return the Runtime. Raises UsageError.

    training: whether matrix products decide the speed; then dtype='auto' is bfloat16 on a CPU only if its products
    are measured to be faster. earlier: (device type, dtype) of the first part of a resumed run, which 'auto' keeps.

    Side effects, all of them for the whole process:
    - torch's random numbers are seeded;
    - TORCHINDUCTOR_CACHE_DIR, if it is not set, becomes a folder in ~/.cache/flatgpt, one per kind of CPU;
    - with several processes: the process group of torch.distributed; sys.excepthook exits at once after an error;
    - on a CPU: glibc's malloc keeps freed memory;
    - on a GPU: it becomes the current device; float32 products use TensorFloat-32; the allocator uses expandable
      segments, unless PYTORCH_ALLOC_CONF is set; fused attention tries the fastest kernel first.
    """
    world_size = num_processes()
    device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)) if world_size > 1 else None)
    if dtype == 'auto' and earlier and earlier[0] == device.type:
        dtype = earlier[1]
    measure = training and dtype == 'auto' and device.type == 'cpu'
    dtype = pick_dtype(dtype, device)
    attention = None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
        use_expandable_segments(device)
        attention = prioritize_attention_kernels(device, dtype)
    set_compile_cache()
    compile = pick_compile(compile, device)   # its trial allocates memory: the allocator must be set before
    if world_size > 1:
        join_process_group(device)
    if measure and dtype == torch.bfloat16 and not bfloat16_is_faster(world_size):
        dtype = torch.float32
    if device.type == 'cpu':
        keep_freed_memory()
    torch.manual_seed(seed % 2**64)   # the same weights in every process
    return Runtime(device, dtype, compile, int(os.environ.get('RANK', 0)), world_size, attention)


def catch_signals(rt: Runtime) -> list[float]:
    """Let Ctrl-C and SIGTERM only add their time to the list that is returned, so that a run can save before it ends. A
    second one raises KeyboardInterrupt."""
    signals = []

    def on_signal(number, frame):
        if not signals:
            rt.notice('stopping after this step, once more to leave at once')
        elif rt.world_size == 1 or time.monotonic() - signals[0] > 1:   # torchrun repeats what a scheduler sent to all
            raise KeyboardInterrupt
        signals.append(time.monotonic())

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return signals


def num_processes() -> int:
    """How many processes torchrun has started, on all hosts; 1 without torchrun."""
    return int(os.environ.get('WORLD_SIZE', 1))


def restarts() -> int:
    """How often torchrun has started this run again, after failures."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def join_process_group(device: torch.device):
    """Connect to the other processes that torchrun started, here and on other hosts. Raises UserError if they do not
    appear in time."""
    seconds = os.environ.get('DIST_TIMEOUT', str(TIMEOUT))
    if not seconds.isdecimal() or int(seconds) == 0:
        raise UsageError(f'DIST_TIMEOUT={seconds}: expected a whole number of seconds')
    timeout = datetime.timedelta(seconds=int(seconds))
    try:
        store, rank, world_size = next(dist.rendezvous('env://', timeout=timeout))
        # torchrun keeps the store over restarts, with the addresses of processes that have ended
        store = dist.PrefixStore(f'start {restarts()}', store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', timeout=timeout,
                                store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        raise UserError(f'the {os.environ["WORLD_SIZE"]} processes did not meet at {where} within {seconds} s: '
                        f'{first_line(error)}') from None
    sys.excepthook = functools.partial(exit_with_error, sys.excepthook)


def exit_with_error(show, error_type, error, trace):
    """sys.excepthook of one process among several: show the error and exit at once, so that torchrun ends the others.
    Those lose their connection, which is not an error of their own."""
    status = 1
    if issubclass(error_type, dist.DistError) or (error_type is RuntimeError and 'gloo/transport' in str(error)):
        print(f'rank {dist.get_rank()}: lost the connection to another process ({first_line(error)}); the message of '
              f'the process that failed first says why', file=sys.__stderr__)
    else:
        try:
            show(error_type, error, trace)
        except SystemExit as end:
            status = end.code
    exit_now(status)


exit_callbacks = []   # functions that finish work in the background, such as writing a checkpoint


def exit_now(status: int):
    """End this process after exit_callbacks, without waiting for other threads: torch's pools never end."""
    for finish in list(exit_callbacks):
        finish()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):   # closed by its reader
            stream.flush()
    os._exit(status)


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters, or its type."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


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
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if apple_gpu_works() else 'cpu'
    device_type, _, index = name.partition(':')
    if device_type not in ('cuda', 'mps', 'cpu') or (index and not index.isdecimal()):
        raise UsageError(f"device={name!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    if device_type == 'cuda':
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if local_rank is not None else int(index or 0)
        if index >= n:
            raise UsageError(f"device='cuda:{index}': torch {torch.__version__} finds {n} GPUs here; try device='auto'")
        return torch.device('cuda', index)
    if device_type == 'mps' and not apple_gpu_works():
        raise UsageError("device='mps': torch finds no Apple GPU that works here; try device='auto'")
    if device_type == 'mps' and local_rank is not None:
        raise UsageError("device='mps': several processes cannot share an Apple GPU; try device='cpu'")
    return torch.device(device_type)


def apple_gpu_works() -> bool:
    """Whether there is an Apple GPU and a trial on it succeeds."""
    return torch.backends.mps.is_available() and works(lambda: torch.ones(4, device='mps').square().sum().item() == 4)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch.dtype of a name; 'auto' is bfloat16 where the hardware multiplies it natively, else float32."""
    if name == 'auto':
        if device.type == 'cuda':
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device.type == 'cpu' and cpu_multiplies_bfloat16()
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise UsageError(f"dtype={name!r}: expected 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (AVX512-BF16, AMX, ARM's BF16) and torch may use them:
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can forbid it. Nothing is timed, so that a resumed run gets the same."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False   # other products in bfloat16 are slow
    can = torch.cpu.get_capabilities()
    emulated = os.environ.get('ONEDNN_MAX_CPU_ISA', '').upper() in ('AVX512_CORE', 'AVX512_CORE_VNNI')
    allowed = torch.backends.cpu.get_cpu_capability() == 'AVX512' and not emulated
    return bool(can.get('bf16') or (allowed and (can.get('avx512_bf16') or can.get('amx_bf16'))))   # 'bf16': of ARM


def bfloat16_is_faster(world_size=1) -> bool:
    """Whether this CPU multiplies matrices in bfloat16 at least a fifth faster than in float32, for all processes: some
    that have the instructions (AVX512-BF16 without AMX) take twice as long."""
    rt = Runtime(torch.device('cpu'), torch.float32, False, 0, world_size)
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        x, y = a.to(dtype), b.to(dtype)
        times.append(rt.best_time(lambda x=x, y=y: x @ y))
    return rt.mean(torch.tensor(times[1] / times[0])).item() < 1 / 1.2


def pick_compile(choice: str | bool, device: torch.device) -> bool:
    """Whether to use torch.compile, if a trial works; 'auto' does not on a CPU, where compiling needs half a minute."""
    if choice not in (True, False, 'auto'):
        raise UsageError(f"compile={choice!r}: expected 'auto', True or False")
    if not choice or (choice == 'auto' and device.type != 'cuda'):
        return False
    zeros = torch.zeros(8, device=device)   # the trial fails without a C++ compiler, without Triton, on an old GPU
    return works(lambda: torch.compile(lambda x: x + 1)(zeros).sum().item() == 8, 'torch.compile')


def set_compile_cache():
    """Let torch.compile keep its code in ~/.cache/flatgpt, so that a start after a reboot needs seconds, not a minute.
    Each kind of CPU has its own folder: torch would load code for AVX-512 where it uses AVX2, with wrong numbers."""
    can = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    cpu = f'{torch.backends.cpu.get_cpu_capability()}-{zlib.crc32(repr(can).encode()):08x}'
    torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag or cpu
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if os.name == 'posix' and 'TORCHINDUCTOR_CACHE_DIR' not in os.environ and os.access(caches, os.W_OK):
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = os.path.join(caches, 'flatgpt', 'compiled', cpu)


def use_expandable_segments(device: torch.device):
    """Let the GPU's allocator grow its segments, which wastes less memory to fragmentation, if that works here and
    PYTORCH_ALLOC_CONF does not set anything else."""
    def allocates(expandable):   # the variable is read when torch is imported, which is too early
        torch._C._accelerator_setAllocatorSettings(f'expandable_segments:{expandable}')
        return torch.ones(8, device=device).sum().item() == 8

    chosen = {'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'} & os.environ.keys()
    if sys.platform == 'linux' and not chosen and not works(lambda: allocates(True)):
        works(lambda: allocates(False))


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


@functools.cache
def attention_kernel_works(kernel: SDPBackend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an attention kernel of torch gives the output and the gradient of the plain one."""
    def results(kernel):
        q = torch.arange(2 * 64 * 64, device=device).sin().view(1, 2, 64, 64).to(dtype).requires_grad_()  # (B, H, T, D)
        with sdpa_kernel(kernel):
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            y.square().sum().backward()   # whose gradient lies as y does
        return torch.stack((y.detach(), q.grad)).float()

    return works(lambda: torch.allclose(results(kernel), results(SDPBackend.MATH), atol=0.05, rtol=0.05))


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for the next step; returns whether it does. By default it returns each large
    tensor to the kernel and asks for new pages: a fifth of the time of a small training step."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # malloc.h
    mallopt = lambda *options: ctypes.CDLL(None).mallopt(*options) == 1   # other C libraries do not have it
    return works(lambda: mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))


def recompute(block: nn.Module):
    """Make a module drop the activations of its forward pass and recompute them in the backward pass (Chen et al.,
    2016): the same gradients from less memory, for a third more FLOPs."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process has; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes, each of which must call this; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has, sharded as a parameter is; as it is if the parameter is not sharded."""
    if not hasattr(parameter, 'placements') or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)   # no messages


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; to a GPU from pinned memory, so that the copy runs in the background."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
