"""
The machine: which device, which precision, whether to compile, how many processes, how fast it could be. The only file
that knows the names of accelerators and of torchrun's variables; everything else asks the Runtime that setup() returns.
"""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import platform
import re
import sys
import time
import warnings
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from configurator import UsageError, UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

PARALLEL = ('ddp', 'fsdp')
DEEP = 24        # layers above which a model is compiled block by block
PATIENCE = 600   # seconds that a process waits for another before it gives up; DIST_TIMEOUT in the environment

# Dense bfloat16 matrix TFLOP/s of a device, by a part of its name, the longest that matches; from the data sheets
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
    attention: str | None = None   # which of torch's fused kernels goes first, on a GPU

    @property
    def master(self):
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def autocast(self):
        """A context in which the matrix products of a forward pass run in dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self):
        """Loss scaling, which float16 needs (Micikevicius et al., 2018); for other types it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def compile_model(self, model, parallel='ddp'):
        """Compile a model in place, upon which its parameters keep their names: as a whole, or if it is deep, or FSDP
        is to spread it, block by block, so that one block's code serves for all and depth costs no time."""
        if model.config.n_layer <= DEEP and (parallel == 'ddp' or self.world_size == 1):
            model.compile()
            return
        for block in model.transformer.h:
            block.compile()
        model.loss = torch.compile(model.loss)   # so that the logits of all positions need no memory in float32

    def compile_step(self, model):
        """Compile the decoding of one token: on a GPU into a CUDA graph, on a CPU with weights packed as its kernels
        read them. Prompts are not compiled. If the first call fails, decoding goes on without."""
        eager, gpu = model.step, self.device.type == 'cuda'
        fast = torch.compile(eager, mode='reduce-overhead') if gpu else torch.compile(eager, options={'freezing': True})
        trials = []   # the result of the first call, which is repeated: the token goes into the same column again

        def step(idx, cache):
            if cache.at == 0 or idx.size(1) > 1:
                return eager(idx, cache)
            if not trials:
                trials.append(works(lambda: fast(idx, cache) is not None, 'torch.compile'))
            return fast(idx, cache) if trials[0] else eager(idx, cache)

        model.step = step

    def wrap(self, model, parallel='ddp', changing=False):
        """The model to call in training: with more than one process, one that averages gradients over them.

        'ddp' keeps all of the model in each process (Li et al., 2020). 'fsdp' keeps a share of each parameter, of its
        gradient and of its moments, and puts a block together only while it is needed (ZeRO stage 3, Rajbhandari et
        al., 2020): model changes in place, its parameters become DTensors, its residual stream is in dtype too.
        changing: whether parameters will be frozen or released later, which 'ddp' alone can.
        """
        if self.world_size == 1:
            return model
        if parallel == 'ddp':
            return DistributedDataParallel(model, [self.device] if self.device.type == 'cuda' else None,
                                           find_unused_parameters=changing)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes half a second

        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)   # of gradients
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    def average_gradients(self, model, on):
        """Whether the coming forward and backward pass averages: only the last micro-batch of a step needs to."""
        if hasattr(model, 'set_requires_gradient_sync'):   # FSDP
            model.set_requires_gradient_sync(on)
        elif self.world_size > 1 and not on:
            return model.no_sync()
        return contextlib.nullcontext()

    def clip_gradients(self, model, limit):
        """Scale the gradients so that their norm, over all parameters and processes, is at most limit; returns what it
        was, a tensor."""
        return together(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))

    def mean(self, tensor):
        """The mean of a tensor over all processes."""
        return self.sum(tensor) / self.world_size   # gloo has no average

    def sum(self, tensor):
        """The sum of a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def parts(self, targets):
        """What to divide the mean losses of the micro-batches of a step by, (M,), so that they add up, over all
        processes, to the mean over all targets, (M, B, T), that are not -1."""
        n = (targets != -1).sum(dim=(1, 2)).float()
        return self.mean(n.sum()).clamp(min=1 / self.world_size) / n.clamp(min=1)   # there may be none at all

    def any(self, flag):
        """Whether flag is true in any process. Between CPUs, so that no GPU is waited for."""
        return flag if self.world_size == 1 else self.mean(torch.tensor(float(flag))).item() > 0

    def same(self, number):
        """Whether a number is the same in all processes."""
        extremes = torch.tensor([number, -number], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return (extremes[0] == -extremes[1]).item()

    def whole(self, state):
        """A copy on the CPU of a nested state, for the master process, None for the others. Every process must call it,
        because tensors that are spread over them are put together."""
        copies = {}   # by the tensor copied: what was one, such as tied weights, stays one

        def copy(node):
            if isinstance(node, dict):
                return {key: copy(value) for key, value in node.items()}
            if isinstance(node, (list, tuple)):
                return type(node)(map(copy, node))
            if not isinstance(node, torch.Tensor):
                return node
            if id(node) not in copies:
                full = together(node.detach())
                copies[id(node)] = torch.empty_like(full, device='cpu').copy_(full) if self.master else None
            return copies[id(node)]

        state = copy(state)
        return state if self.master else None

    def reseed(self, seed, step):
        """Make dropout a function of (seed, step, rank), so that a resumed run drops what it would have dropped."""
        torch.manual_seed(((seed * 1_000_003 + step) * self.world_size + self.rank) % 2**64)

    def sync(self):
        """Wait for the device to finish what it was given, before a clock is read."""
        if self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize()

    def peak_memory(self):
        """The most memory used so far, in bytes: the device's, or on a CPU that of the process; None if unknown."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == 'mps':
            return torch.mps.driver_allocated_memory()
        # on Linux, where getrusage() also counts what the process was before it ran this program
        with contextlib.suppress(OSError), open('/proc/self/status') as f:
            if own := re.search(r'VmHWM:\s*(\d+) kB', f.read()):
                return int(own[1]) * 1024
        with contextlib.suppress(ImportError):   # Windows
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

    def peak_flops(self):
        """FLOP/s that this device could reach at most in dtype: from a table, or on a CPU the best of a few matrix
        products; None if unknown."""
        if self.device.type == 'cpu':
            return self.measured_flops()
        name = self.name()
        known = max((part for part in PEAK_TFLOPS if re.search(rf'\b{part}\b', name)), key=len, default=None)
        # TensorFloat-32 runs at half the rate of bfloat16
        return PEAK_TFLOPS[known] * 1e12 / (2 if self.dtype == torch.float32 else 1) if known else None

    def measured_flops(self):
        """FLOP/s of the best of a few square matrix products in dtype."""
        cpu = self.device.type == 'cpu'
        dtype = torch.float32 if cpu and self.dtype == torch.float16 else self.dtype
        slow = cpu and dtype == torch.bfloat16 and not cpu_multiplies_bfloat16()   # 200 times slower than float32
        n = 256 if slow else 1024 if cpu else 8192
        a, b = torch.randn(2, n, n, device=self.device).to(dtype)
        return 2 * n**3 / self.best_time(lambda: a @ b)

    def measured_bandwidth(self):
        """Bytes per second at which memory is read: the best of a few sums over more than caches hold."""
        x = torch.ones(2**27 if self.device.type == 'cpu' else 2**29, device=self.device, dtype=torch.bfloat16)
        return x.nbytes / min(self.best_time(x.sum), self.best_time(x.view(torch.float32).sum))

    def best_time(self, work, times=10):
        """Seconds that the fastest of a few calls takes."""
        best = math.inf
        for _ in range(times):
            self.sync()
            t0 = time.perf_counter()
            work()
            self.sync()
            best = min(best, time.perf_counter() - t0)
        return best

    def name(self):
        if self.device.type == 'cuda':
            return torch.cuda.get_device_name(self.device)
        threads = f', {torch.get_num_threads()} threads' if self.device.type == 'cpu' else ''
        return platform.machine() + threads

    def describe(self):
        """One line to paste into a bug report."""
        kernel = f'{self.attention} attention, ' if self.attention else ''
        return (f'{self.device} ({self.name()}), {str(self.dtype)[6:]}, {kernel}'
                f'{"" if self.compile else "not "}compiled, {self.world_size} process{"es" * (self.world_size > 1)}, '
                f'torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}')

    def close(self, status=0):
        """End this process with an exit status. One of several leaves at once, without the interpreter's clean-up, in
        which communication threads that still hold a tensor would abort it."""
        if self.world_size > 1:
            dist.destroy_process_group()
            leave(status)
        if status:
            sys.exit(status)


def setup(device='auto', dtype='auto', compile='auto', seed=0, training=False, earlier=None):
    """Choose the machine and seed it; joins the other processes when torchrun started this one. Raises UsageError.

    training: whether matrix products decide the speed; then dtype='auto' is bfloat16 on a CPU only if its products
    are measured to be faster. earlier: (device type, dtype) of the first part of a resumed run, which 'auto' keeps.
    """
    rank, world_size = int(os.environ.get('RANK', 0)), processes()
    device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)) if world_size > 1 else None)
    if dtype == 'auto' and earlier and earlier[0] == device.type:
        dtype = earlier[1]
    measure = training and dtype == 'auto' and device.type == 'cpu'
    dtype = pick_dtype(dtype, device)
    attention = None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')   # TensorFloat-32 where float32 is asked for
        let_segments_grow(device)
        attention = prefer_attention(device, dtype)
    keep_compiled_code()
    compile = pick_compile(compile, device)   # its trial allocates memory, which let_segments_grow must come before
    if world_size > 1:
        join(device)
    if measure and dtype == torch.bfloat16 and not bfloat16_is_faster(world_size):
        dtype = torch.float32
    if device.type == 'cpu':
        keep_freed_memory()
    torch.manual_seed(seed % 2**64)   # the same weights in every process
    return Runtime(device, dtype, compile, rank, world_size, attention)


def processes():
    """How many of them torchrun has started, on all hosts."""
    return int(os.environ.get('WORLD_SIZE', 1))


def join(device):
    """Meet the other processes that torchrun started, here and on other hosts; UserError if they do not come."""
    seconds = os.environ.get('DIST_TIMEOUT', str(PATIENCE))
    if not seconds.isdecimal() or int(seconds) == 0:
        raise UsageError(f'DIST_TIMEOUT={seconds}: expected a whole number of seconds')
    timeout = datetime.timedelta(seconds=int(seconds))
    try:
        store, rank, world_size = next(dist.rendezvous('env://', timeout=timeout))
        # torchrun keeps the store when it starts processes again, with the addresses of those that are gone
        store = dist.PrefixStore(f'start {restarts()}', store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', timeout=timeout,
                                store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        raise UserError(f'the {os.environ["WORLD_SIZE"]} processes did not meet at {where} within {seconds} s: '
                        f'{first_line(error)}') from None
    sys.excepthook = functools.partial(leave_with_error, sys.excepthook)


def leave_with_error(show, kind, error, trace):
    """sys.excepthook of one process among several: show the error and leave at once, upon which torchrun ends the
    others. They lose their connection then, which is no error of theirs."""
    status = 1
    if issubclass(kind, dist.DistError) or kind is RuntimeError and 'gloo/transport' in str(error):
        print(f'rank {dist.get_rank()}: no connection to another process any more ({first_line(error)}); what the '
              f'first to fail has printed says why', file=sys.__stderr__)
    else:
        try:
            show(kind, error, trace)
        except SystemExit as end:
            status = end.code
    leave(status)


before_leaving = []   # functions that end what this process has begun, such as writing a checkpoint


def leave(status):
    """End this process, without waiting for threads other than those of before_leaving: torch's pools never end."""
    for finish in before_leaving:
        finish()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):   # nobody reads any more
            stream.flush()
    os._exit(status)


def restarts():
    """How often torchrun has started this run again, after failures."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def first_line(error):
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def works(trial, asked_for=None):
    """Whether a trial of a special kernel succeeds on this machine: it raises nothing and returns true. If not, and if
    the user has asked for the kernel by a name, asked_for, one line on stderr says so."""
    reason = 'wrong numbers'
    try:
        with warnings.catch_warnings(action='ignore'):
            if trial():
                return True
    except Exception as error:   # each library raises its own kind
        reason = f'{type(error).__name__}: {first_line(error)}'
    if asked_for and int(os.environ.get('LOCAL_RANK', 0)) == 0:   # once per machine
        print(f'{asked_for} does not work here ({reason}), going on without', file=sys.stderr)
    return False


def pick_device(name, local_rank):
    """The torch.device of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'; with several processes each takes its own GPU."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if apple_gpu_works() else 'cpu'
    kind, _, index = name.partition(':')
    if kind not in ('cuda', 'mps', 'cpu') or index and not index.isdecimal():
        raise UsageError(f"device={name!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    if kind == 'cuda':
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if local_rank is not None else int(index or 0)
        if index >= n:
            raise UsageError(f"device='cuda:{index}': torch {torch.__version__} finds {n} GPUs here; try device='auto'")
        return torch.device('cuda', index)
    if kind == 'mps' and not apple_gpu_works():
        raise UsageError("device='mps': torch finds no Apple GPU that works here; try device='auto'")
    if kind == 'mps' and local_rank is not None:
        raise UsageError("device='mps': several processes cannot share an Apple GPU; try device='cpu'")
    return torch.device(kind)


def apple_gpu_works():
    """Whether there is an Apple GPU that multiplies matrices."""
    return torch.backends.mps.is_available() and works(lambda: torch.ones(4, device='mps').square().sum().item() == 4)


def pick_dtype(name, device):
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


def cpu_multiplies_bfloat16():
    """Whether this CPU has instructions that multiply bfloat16 (AVX512-BF16, AMX, ARM's BF16) and this process may use
    them: ATEN_CPU_CAPABILITY limits torch, ONEDNN_MAX_CPU_ISA limits oneDNN. No time is measured, so that a resumed run
    finds the same."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False   # no other products in bfloat16 are fast
    can = torch.cpu.get_capabilities()
    emulated = os.environ.get('ONEDNN_MAX_CPU_ISA', '').upper() in ('AVX512_CORE', 'AVX512_CORE_VNNI')
    allowed = torch.backends.cpu.get_cpu_capability() == 'AVX512' and not emulated
    return bool(can.get('bf16') or (allowed and (can.get('avx512_bf16') or can.get('amx_bf16'))))   # 'bf16': of ARM


def bfloat16_is_faster(world_size=1):
    """Whether this CPU multiplies matrices in bfloat16 at least a fifth faster than in float32, for all processes: some
    that have the instructions (AVX512-BF16 without AMX) take twice as long."""
    rt = Runtime(torch.device('cpu'), torch.float32, False, 0, world_size)
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        x, y = a.to(dtype), b.to(dtype)
        times.append(rt.best_time(lambda x=x, y=y: x @ y))
    return rt.mean(torch.tensor(times[1] / times[0])).item() < 1 / 1.2


def pick_compile(choice, device):
    """Whether to use torch.compile, if a trial works: 'auto' says yes on a GPU and no on a CPU, where it costs half a
    minute before the first step."""
    if choice not in (True, False, 'auto'):
        raise UsageError(f"compile={choice!r}: expected 'auto', True or False")
    if not choice or (choice == 'auto' and device.type != 'cuda'):
        return False
    zeros = torch.zeros(8, device=device)   # the trial fails without a C++ compiler, without Triton, on an old GPU
    return works(lambda: torch.compile(lambda x: x + 1)(zeros).sum().item() == 8, 'torch.compile')


def keep_compiled_code():
    """Let what torch.compile makes outlive a restart of the machine, so that a second start needs seconds, not a
    minute; unless TORCHINDUCTOR_CACHE_DIR names a place for it. Each kind of CPU has its own: torch would take code
    that was made for AVX-512 where it uses AVX2, and give wrong numbers."""
    can = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    cpu = f'{torch.backends.cpu.get_cpu_capability()}-{zlib.crc32(repr(can).encode()):08x}'
    torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag or cpu
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if os.name == 'posix' and 'TORCHINDUCTOR_CACHE_DIR' not in os.environ and os.access(caches, os.W_OK):
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = os.path.join(caches, 'flatgpt', 'compiled', cpu)


def let_segments_grow(device):
    """Have the GPU's allocator extend what it has instead of adding new pieces, so that less is lost between tensors;
    unless PYTORCH_ALLOC_CONF says something else, or it cannot."""
    def allocates(grow):   # the variable is read when torch is imported, which is too early
        torch._C._accelerator_setAllocatorSettings(f'expandable_segments:{grow}')
        return torch.ones(8, device=device).sum().item() == 8

    chosen = {'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'} & os.environ.keys()
    if sys.platform == 'linux' and not chosen and not works(lambda: allocates(True)):
        works(lambda: allocates(False))


order_of_kernels = contextlib.ExitStack()   # entered by prefer_attention, for as long as the process lives


def prefer_attention(device, dtype):
    """Have torch's fused attention use the fastest kernel that works here, and return its name. On the data-centre
    GPUs since Hopper that is cuDNN's, on others FlashAttention 2. Kernels whose trial fails are not used at all."""
    fastest = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if torch.cuda.get_device_capability(device) in ((9, 0), (10, 0), (10, 3)):
        fastest[:2] = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    order_of_kernels.close()
    order = [kernel for kernel in fastest if attention_works(kernel, device, dtype)] + [SDPBackend.MATH]
    order_of_kernels.enter_context(sdpa_kernel(order, set_priority=True))
    return order[0].name.removesuffix('_ATTENTION').lower()


@functools.cache
def attention_works(kernel, device, dtype):
    """Whether one of torch's attention kernels gives the output and the gradient of the plain one."""
    def results(kernel):
        q = torch.arange(2 * 64 * 64, device=device).sin().view(1, 2, 64, 64).to(dtype).requires_grad_()  # (B, H, T, D)
        with sdpa_kernel(kernel):
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            y.square().sum().backward()   # whose gradient lies as y does
        return torch.stack((y.detach(), q.grad)).float()

    return works(lambda: torch.allclose(results(kernel), results(SDPBackend.MATH), atol=0.05, rtol=0.05))


def recompute(block):
    """Make a module drop the activations of its forward pass and compute them again in the backward pass (Chen et al.,
    2016): the same gradients from less memory, for a third more FLOPs."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def local(tensor):
    """What this process has of a tensor that may be spread over the processes."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def together(tensor):
    """A tensor that may be spread over the processes (a DTensor), whole; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def spread_like(tensor, parameter):
    """A tensor that every process has, spread over the processes as a parameter is."""
    if not hasattr(parameter, 'placements') or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)   # no messages


def keep_freed_memory():
    """Have malloc keep what is freed for the next step, and return whether it does: glibc's can. It would give every
    large tensor back to the kernel and ask for it again, empty: a fifth of the time of a small training step."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # malloc.h
    mallopt = lambda *options: ctypes.CDLL(None).mallopt(*options) == 1   # other C libraries do not have it
    return works(lambda: mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))


def to_device(tensor, device):
    """A CPU tensor on a device; from pinned memory to a GPU, so that the copy need not be waited for."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

