"""On a GPU, run by make test-gpu: it computes what the CPU computes in float32, wrappers and compiled code change
nothing, an interrupted run goes on bit for bit, and the scripts work."""

import json
import os
import sys

import pytest
import test_dpo
import test_grpo
import torch
import torch.distributed as dist
from conftest import log_of, needs, run
from in_process import call

from flatgpt import alignment, checkpoint, engine, lora, machine, optim, quantize, runtime
from flatgpt.batching import Batch, Request, Session
from flatgpt.dataset import Dataset
from flatgpt.engine import generate
from model import ARCHS, GPT, GPTConfig

# each version of torch has warnings of its own about GPUs
pytestmark = [pytest.mark.gpu, needs('gpu'), pytest.mark.filterwarnings('default')]

GPU, CPU = torch.device('cuda', 0), torch.device('cpu')
SHAPE = {'vocab_size': 96, 'block_size': 32, 'n_layer': 2, 'n_head': 4, 'n_embd': 64}
ON_GPU = ('--device=cuda', '--compile=False')
LR = 1e-2   # of the optimizer


@pytest.fixture
def exact():
    """Matrix products in float32 have all its digits; runtime.setup() allows TensorFloat-32, which has 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def compiler():
    """torch.compile without what it has made for other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def a_model(spread=0.05, seed=1, **changes):
    """A model, on the CPU, in which every parameter is at random."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return model


def ids_of(*shape, vocab=96, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# training

def one_step(rt, model):
    """The loss, the gradients and the weights of one step, as train.py makes it: a number, {name: tensor on the CPU}
    twice."""
    model.to(rt.device).train()
    if rt.compile:
        rt.compile_model(model)
    opt, scaler = optim.build('adamw', model, LR, (0.9, 0.95), 0.1, rt.dtype), rt.grad_scaler()
    tokens = machine.to_device(ids_of(8, 33), rt.device)
    with rt.autocast():
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    gradients = {name: p.grad.to('cpu', copy=True) for name, p in model.named_parameters()}
    rt.clip_gradients(model, 1.0)
    scaler.step(opt)
    scaler.update()
    return loss.item(), gradients, {name: p.detach().to('cpu', copy=True) for name, p in model.named_parameters()}


@pytest.fixture(scope='module')
def of_the_cpu():
    """The step of the CPU in float32."""
    return one_step(runtime.Runtime(CPU, torch.float32, False, 0, 1), a_model())


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('dtype, tolerance', [('float32', 0.01), ('float16', 0.01), ('bfloat16', 0.05)])
def test_a_training_step_is_that_of_the_cpu_in_float32(of_the_cpu, compiler, dtype, tolerance, compiled):
    rt = runtime.setup('cuda', dtype, False)
    rt.compile = compiled   # without the trial that setup() makes
    loss, gradients, after = one_step(rt, a_model())
    expected_loss, expected, expected_after = of_the_cpu
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    steady = 0
    for name, g in expected.items():
        error = (gradients[name] - g).norm() / g.norm()
        moved = (after[name] - expected_after[name]).abs()
        print(f'{name}: gradient off by {error:.1e}, weights by {moved.max() / LR:.1e} learning rates')
        assert error < tolerance
        assert moved.max() <= 2.01 * LR   # AdamW's first step is as long as the learning rate
        large = g.abs() > 20 * tolerance * g.square().mean().sqrt()   # its sign is not in doubt
        assert (moved[large] < 0.01 * LR).all()
        steady += large.sum().item()
    assert steady > 0.1 * sum(g.numel() for g in expected.values())


def test_the_most_memory_used_is_that_of_the_gpu():
    rt = runtime.setup('cuda', 'float32', False)
    more = rt.peak_memory() + 2**26
    x = torch.zeros(more, dtype=torch.uint8, device=GPU)
    most = rt.peak_memory()
    assert more <= most < more + 2**30
    del x
    assert rt.peak_memory() == most


EXACT = """
import torch
torch.use_deterministic_algorithms(True)
"""
INTERRUPT = """
import os, signal
from flatgpt.dataset import Dataset
_train_batch = Dataset.train_batch
def _signal(data, step, *rest):
    if step == 13:    # which is asked for during step 12
        os.kill(os.getpid(), signal.SIGTERM)
    return _train_batch(data, step, *rest)
Dataset.train_batch = _signal
"""


def train(*args, status=0):
    """A process of train.py on the GPU, with kernels that give the same bits each time."""
    done = run('train.py', *args, *ON_GPU, '--dtype=bfloat16', '--dropout=0.1', CUBLAS_WORKSPACE_CONFIG=':4096:8')
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope='module')
def gpu_run(tmp_path_factory, tiny):
    """(out_dir of a finished run on the GPU, what it said, the path of the config that makes it exact)"""
    folder = tmp_path_factory.mktemp('gpu')
    (folder / 'exact.py').write_text(EXACT)
    done = train(tiny, folder / 'exact.py', f'--out_dir={folder / "out"}')
    return folder / 'out', done, folder / 'exact.py'


def state_of(out_dir):
    """{name: tensor} of the weights and the optimizer in ckpt.pt."""
    ckpt = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    moments = {f'{i} {key}': value for i, of in ckpt['optimizer']['state'].items() for key, value in of.items()}
    return {**ckpt['model'], **moments}


def test_a_run_learns_and_says_on_which_gpu(gpu_run):
    out_dir, done, _ = gpu_run
    assert f'cuda:0 ({torch.cuda.get_device_name(0)}), bfloat16, ' in done.stderr
    losses = [record['val_loss'] for record in log_of(out_dir) if 'val_loss' in record]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    assert {tensor.device for tensor in state_of(out_dir).values()} == {CPU}


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(gpu_run, tiny, tmp_path):
    out_dir, _, exact_config = gpu_run
    (tmp_path / 'interrupt.py').write_text(INTERRUPT)
    args = tiny, exact_config, f'--out_dir={tmp_path / "out"}'
    train(*args, tmp_path / 'interrupt.py', status=130)
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 13
    train(*args, '--init_from=resume')
    one, two = state_of(out_dir), state_of(tmp_path / 'out')
    assert one.keys() == two.keys() and len(one) > 30
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert log_of(out_dir) == log_of(tmp_path / 'out')


# ---------------------------------------------------------------------------------------------------------------------
# several processes: a group of this one alone

@pytest.fixture
def several(monkeypatch):
    """A Runtime that wraps models as it does for several processes, over NCCL, in a group of this process alone."""
    alone = {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '0',
             'GLOO_SOCKET_IFNAME': 'lo', 'NCCL_SOCKET_IFNAME': 'lo', 'DIST_TIMEOUT': '60'}   # no network is needed
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    make_mesh = dist.init_device_mesh
    monkeypatch.setattr(dist, 'init_device_mesh', lambda device_type, shape: make_mesh(device_type, (1,)))
    runtime.join_process_group(GPU)
    yield runtime.Runtime(GPU, torch.float32, False, rank=0, world_size=2)   # of one process it would wrap nothing
    dist.destroy_process_group()


def losses_and_weights(rt, parallel):
    """The losses of three steps of two micro-batches each, and the weights after them, {name: tensor}."""
    model = a_model(bias=False).to(GPU).train()
    wrapped = rt.wrap(model, parallel)
    opt, losses = optim.build('adamw', model, 1e-3, (0.9, 0.95), 0.1, torch.float32), []
    for step in ids_of(3, 2, 4, 33).to(GPU):
        for micro, rows in enumerate(step):
            with rt.average_gradients(wrapped, on=micro == 1):
                loss = wrapped(rows[:, :-1], rows[:, 1:])[1] / 2
                loss.backward()
            losses.append(loss.item())
        rt.clip_gradients(model, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
    return losses, rt.gather_state(model.state_dict())


@pytest.mark.parametrize('parallel', runtime.PARALLEL)
def test_a_wrapped_model_makes_the_steps_of_a_plain_one(several, exact, parallel):
    expected, plain = losses_and_weights(runtime.Runtime(GPU, torch.float32, False, 0, 1), parallel)
    losses, wrapped = losses_and_weights(several, parallel)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert wrapped.keys() == plain.keys()
    for name, weight in plain.items():
        assert (wrapped[name] - weight).abs().mean() < 1e-5, name   # a hundredth of a learning rate
    assert several.mean(torch.full((2,), 6.0, device=GPU)).tolist() == [3.0, 3.0]   # a sum over one, for two
    assert several.any_process(True) and several.same_everywhere(4.0)   # between CPUs


# ---------------------------------------------------------------------------------------------------------------------
# decoding

PROMPTS = [ids_of(n, seed=n) for n in (3, 7, 1, 6, 2)]
MODELS = {'gpt2': {}, 'llama': {**ARCHS['llama'], 'n_kv_head': 2}, 'alibi': {'pos': 'alibi', 'window': 9}}


def greedy(model, prompts=PROMPTS, n=60, **options):
    """The likeliest tokens, (B, n) as lists; more than the context, whose newer half is encoded again."""
    return torch.stack([token for token, _ in generate(model, prompts, n, temperature=0, **options)], dim=1).tolist()


def random_model(name, device):
    """A model whose likeliest token is, with this seed, always likelier than the next by a thousandth or more."""
    return a_model(spread=0.3, seed=6, **MODELS[name]).to(device).eval()


@pytest.mark.parametrize('name', MODELS)
def test_greedy_text_is_that_of_the_cpu(exact, name):
    expected = greedy(random_model(name, CPU))
    assert len({token for row in expected for token in row}) > 10
    model = random_model(name, GPU)
    assert greedy(model) == expected
    assert greedy(model, static_cache=True) == expected
    assert greedy(model, [PROMPTS[1]]) == [expected[1]]


def test_requests_that_are_decoded_together_get_the_text_of_the_cpu(exact):
    model, n = random_model('llama', GPU), 20
    expected = greedy(random_model('llama', CPU), n=n)
    requests = [Request(prompt, n, temperature=0) for prompt in PROMPTS]
    batch, texts = Batch(model, rows=3), {}
    waiting = list(requests)
    while waiting or batch.requests:
        steps = [batch.add(waiting.pop(0))] if waiting and len(batch.requests) < 3 else batch.step()
        for step in steps:
            texts.setdefault(step.request, []).append(step.token)
            if batch.finished(step.request):
                batch.remove(step.request)
    assert [texts[request] for request in requests] == expected
    session = Session(model)
    assert [[token for token, _ in session.generate(request)] for request in requests] == expected


def test_greedy_text_by_cuda_graphs_is_that_of_the_cpu(exact, compiler, capsys):
    from torch._dynamo.utils import counters
    from torch._inductor import cudagraph_trees

    model = random_model('llama', GPU)
    counters.clear()
    engine.compile_step(model)
    texts = [PROMPTS, PROMPTS[::-1]]
    expected = [greedy(random_model('llama', CPU), prompts) for prompts in texts]
    assert greedy(model, static_cache=True) == expected[0]
    streams = [generate(model, prompts, 60, temperature=0, static_cache=True) for prompts in texts]
    tokens = [torch.stack((one, other)) for (one, _), (other, _) in zip(*streams)]   # in turn, with two caches
    assert torch.stack(tokens, dim=2).tolist() == expected
    assert 'torch.compile does not work here' not in capsys.readouterr().err
    assert counters['inductor']['cudagraph_skips'] == 0 and counters['stats']['unique_graphs'] == 1
    manager = cudagraph_trees.get_manager(GPU.index, create_if_none_exists=False)
    assert manager is not None and manager.new_graph_id().id > 0   # which counts the graphs


def test_8_bit_weights_give_the_logits_of_the_cpu_and_cost_little_of_the_loss(exact, gpu_run, char_dataset):
    data, losses, logits = Dataset(str(char_dataset)), {}, {}
    for device in (CPU, GPU):
        x, y = data.eval_batch('val', 0, 1, 100, 16, device)
        model = checkpoint.load_model(gpu_run[0])[0].to(device)
        with torch.inference_mode():
            losses[device, 'whole'] = model(x, y)[1].item()
            quantize.replace_linears(model, quantize.Int8Linear)
            logits[device], loss = model(x, y)
        losses[device, 'int8'] = loss.item()
    print(losses)
    torch.testing.assert_close(logits[GPU].cpu(), logits[CPU], atol=1e-3, rtol=1e-3)
    assert losses[GPU, 'int8'] == pytest.approx(losses[GPU, 'whole'], rel=0.01)


def test_samples_are_the_same_each_time(gpu_run):
    args = (f'--out_dir={gpu_run[0]}', '--start=4 times', '--num_samples=3', '--max_new_tokens=20', *ON_GPU)
    for more in ((), ('--dtype=float32',), ('--quantize=int8',)):
        one, two = (call('sample.py', *args, *more) for _ in range(2))
        assert one.returncode == 0, one.stderr
        assert one.stdout == two.stdout and one.stdout.count('4 times') >= 3
        assert 'cuda:0 (' in one.stderr and '60 tokens in' in one.stderr


# ---------------------------------------------------------------------------------------------------------------------
# what becomes of a run

def test_an_adapter_is_trained_merged_and_exported(exact, gpu_run, tiny, tmp_path):
    done = call('train.py', tiny, *ON_GPU, '--dtype=bfloat16', f'--init_from={gpu_run[0]}', '--lora_rank=3',
                f'--out_dir={tmp_path / "adapter"}')
    assert done.returncode == 0, done.stderr
    torch.set_float32_matmul_precision('highest')   # which train.py has lowered
    apart, merged = (checkpoint.load_model(tmp_path / 'adapter', merged=merged)[0].to(GPU) for merged in (False, True))
    assert lora.adapters(apart) and not lora.adapters(merged)
    x = ids_of(4, 16, vocab=20).to(GPU)
    with torch.inference_mode():
        expected, base = apart(x, x)[0], checkpoint.load_model(gpu_run[0])[0].to(GPU)(x, x)[0]
        torch.testing.assert_close(merged(x, x)[0], expected, atol=1e-4, rtol=1e-4)
        assert (base - expected).abs().max() > 0.01   # it has learnt something
    done = call('export.py', f'--out_dir={tmp_path / "adapter"}', f'--to={tmp_path / "exported"}')
    assert done.returncode == 0, done.stderr
    again = checkpoint.load_model(tmp_path / 'exported')[0].to(GPU)
    with torch.inference_mode():
        torch.testing.assert_close(again(x, x)[0], expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# preferences and rewards

base, pairs, letters = test_dpo.base, test_dpo.pairs, test_grpo.letters   # fixtures


def test_log_probabilities_and_their_gradients_are_those_of_the_cpu(exact):
    idx = ids_of(6, 20)
    targets = torch.where(ids_of(6, 20, vocab=3, seed=1) > 0, ids_of(6, 20, seed=2), -1)
    found, gradients = [], []
    for device in (CPU, GPU):
        model = a_model(**MODELS['llama']).to(device)
        log_probs = alignment.LogProbs(model, 0.8)(idx.to(device), targets.to(device))
        log_probs.sum().backward()
        found.append(log_probs.detach().cpu())
        gradients.append([p.grad.cpu() for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


@pytest.fixture(params=['dpo.py', 'dpo.py --lora_rank=2', 'grpo.py --kl=0.01 --updates=2'])
def aligned(request, base, pairs, letters):
    """A function of a folder and options, which runs a script with them and returns what it has logged."""
    script, *more = request.param.split()

    def execute(out_dir, *options):
        arguments = test_dpo.arguments(base, pairs, out_dir) if script == 'dpo.py' else \
            test_grpo.arguments(letters, out_dir)
        done = call(script, *arguments, *more, '--max_iters=8', '--eval_interval=4', *options)
        assert done.returncode == 0, done.stderr
        return [{k: v for k, v in record.items() if k != 'seconds_drawing'} for record in log_of(out_dir)]

    return execute


def test_preferences_and_rewards_are_learned_as_on_the_cpu(aligned, tmp_path):
    first, last = ([records[0], records[-1]] for records in (
        aligned(tmp_path / name, f'--device={name}') for name in ('cpu', 'cuda')))
    for expected, found in zip(first, last):
        for key in ('val_loss', 'val_reward'):   # TensorFloat-32 has 10 bits
            assert found.get(key) == pytest.approx(expected.get(key), abs=0.05), (expected, found)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_interrupted_alignment_goes_on_bit_for_bit(aligned, tmp_path, dtype):
    on = ('--device=cuda', f'--dtype={dtype}')
    whole = aligned(tmp_path / 'whole', *on)
    aligned(tmp_path / 'parts', *on, '--max_iters=4', '--lr_decay_iters=8')
    assert aligned(tmp_path / 'parts', *on, '--init_from=resume', '--lr_decay_iters=8') == whole
    one, other = (checkpoint.load(tmp_path / name / 'ckpt.pt')['model'] for name in ('whole', 'parts'))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# measurements

SMALL = ('--device=cuda', '--block_size=64', '--n_layer=2', '--n_head=2', '--n_embd=64', '--vocab_size=100',
         '--steps=3', '--batch_size=4')


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_bench_profiles_a_step_and_says_how_much_memory_it_took(tmp_path):
    done = run('bench.py', *SMALL, '--compile=False', '--profile=True', cwd=tmp_path)
    result = result_of(done)
    assert result['machine'].startswith('cuda:0 (') and 'bfloat16' in result['machine']
    assert 2**20 < result['peak_memory_bytes'] < 2**32
    assert f'peak memory  {result["peak_memory_bytes"] / 2**30:,.2f} GiB' in done.stdout
    assert result['loss'] == pytest.approx(4.6, abs=0.3)   # log(100)
    assert 1e12 < result['measured_flops'] < 1e16 and 1e10 < result['measured_bandwidth'] < 1e14
    assert 'Self CUDA' in done.stdout and os.listdir(tmp_path) == ['bench_log']
    trace, = (tmp_path / 'bench_log').iterdir()
    events = json.loads(trace.read_text(encoding='utf-8'))['traceEvents']
    assert any(event.get('cat') == 'kernel' for event in events)


@pytest.mark.parametrize('args', [
    ['--versus=optimizer=muon dtype=float16'], ['--lora_rank=2', '--activation_checkpointing'],
    ['--mode=attention'], ['--mode=decode'], ['--mode=decode', '--quantize=int8', '--arch=llama'],
], ids=' '.join)
def test_bench_measures(args):
    result = result_of(call('bench.py', *SMALL, '--compile=False', *args))
    for setting in result.get('settings', [result]):
        assert setting['tok_per_s'] > 0 and setting['reached'] > 0


def test_bench_measures_batches_of_a_dataset(char_dataset):
    result = result_of(call('bench.py', *SMALL, '--compile=False', '--mode=data', f'--dataset={char_dataset}'))
    assert result['tok_per_s'] > 0


def test_bench_decodes_by_cuda_graphs(compiler):
    done = call('bench.py', *SMALL, '--mode=decode', '--compile=True', '--steps=8', '--warmup_steps=3')
    result = result_of(done)
    assert ', compiled,' in result['machine'] and 'does not work here' not in done.stderr
    assert result['ms_max'] < 1000   # nothing is compiled in the steps that count
