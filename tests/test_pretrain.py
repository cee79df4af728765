"examples/pretrain.py alone, with torchrun and under Slurm; and what is left when a process dies"
import importlib.util, math, os, re, shlex, signal, socket, subprocess, sys, time, uuid
from contextlib import suppress
from pathlib import Path

import numpy as np, psutil, pytest
from fastcore.script import CliError, anno_parser
from PIL import Image

from self_supervised.all import create_encoder, create_swav_model, fashion_mnist, knn, load_encoder, read_whole, ssl_methods, tensor_dls

pytestmark = pytest.mark.slow

n_images = 2048
n_few,steps_per_epoch = 256,4 # in the runs that are cut short, with 64 images a step
tiny = '--arch test_mambaout --size 28 --n-in 1 --gentle --hidden-size 256 --n-protos 30 --queue 0 --workers 0'.split()

def tiny_encoder(): return create_encoder('test_mambaout', pretrained=False, n_in=1)

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "The first images of the embedded Fashion-MNIST, as files; those in few/ are for runs where nothing is learned"
    path = tmp_path_factory.mktemp('images')
    (path/'few').mkdir()
    for i,x in enumerate(fashion_mnist()[0][0][:n_images]): Image.fromarray(x[0].numpy()).save(path/('few' if i<n_few else '')/f'{i:04}.png')
    return path

@pytest.fixture
def start(project, tmp_path):
    "Start a command, its output in files; whatever is left of it at the end of the test is killed"
    tag = uuid.uuid4().hex
    def _start(*cmd, **env):
        out,err = (tmp_path/f'{uuid.uuid4().hex}.{o}' for o in ('out','err'))
        env = {**os.environ, 'PATH':f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'OMP_NUM_THREADS':'1', 'PRETRAIN_TEST':tag, **env}
        with out.open('w') as o, err.open('w') as e: p = subprocess.Popen([str(c) for c in cmd], cwd=project, env=env, stdout=o, stderr=e)
        p.out,p.err = out.read_text,err.read_text
        return p
    yield _start
    for p in psutil.process_iter():
        with suppress(psutil.Error): # ended meanwhile, or somebody else's
            if p.environ().get('PRETRAIN_TEST')==tag: p.kill()

def free_port(ports=(0,)): # 0: the system picks one
    for port in ports:
        with suppress(OSError), socket.socket() as s:
            s.bind(('localhost', port))
            return s.getsockname()[1]

def torchrun(n): return 'torchrun', '--nproc-per-node', n, '--master-port', free_port()

def wait_until(ready, p, seconds=120):
    end = time.monotonic()+seconds
    while not ready():
        assert p.poll() is None and time.monotonic()<end, p.out()+p.err()
        time.sleep(.02)

def rows(out):
    "Losses of the table that a run prints, which must not be there twice"
    assert len(re.findall(r'epoch +train_loss', out))<=1, out
    found = re.findall(r'^\W*(\d+) +(\S+) +None', out, re.M)
    assert [int(i) for i,_ in found]==list(range(len(found))), out
    return [float(o) for _,o in found]

def check_run(p, out, epochs):
    "A run that must end well: its losses"
    assert p.wait(240)==0, p.err()
    losses = rows(p.out())
    assert len(losses)==epochs and all(map(math.isfinite, losses)), p.out()
    assert p.out().count(f'{out}/encoder.safetensors')==1
    assert {o.name for o in out.iterdir()}=={'checkpoints', 'encoder.safetensors'}
    return losses

def accuracy(encoders):
    "k-NN on images that the script has not seen"
    (x,y),test = fashion_mnist()
    dls = tensor_dls((x[:n_images],y[:n_images]), test, bs=500, drop_last=False)
    return [float(knn(o, dls)) for o in encoders]

def check_saved(out, done):
    "The newest checkpoint is whole, and of the first epoch that is not in the table, or its last step"
    saved = read_whole(max((out/'checkpoints').glob('*.ckpt')))
    create_swav_model(tiny_encoder(), n_protos=30).load_state_dict(saved['model'])
    assert 0 <= saved['train_iter']-steps_per_epoch*len(done) <= steps_per_epoch+1

# k-NN in %, mean ± standard deviation over seeds 42 to 47: SwAV 72.6 ± 0.7 on one process and 71.4 ± 0.9 on two (without the batch norm
# in its projector, which sees half the batch there, 71.8 ± 1.1 and 72.3 ± 0.8), SimCLR 72.9 ± 1.1 and 73.5 ± 1.1; the untrained encoder
# 65.7 ± 2.5 (12 seeds). The difference of two runs then has a standard deviation of at most 1.6, and 5 is three of them. Losses at the
# end differ by up to 0.18; without the negatives of the other process SimCLR's would be lower by 0.6.
@pytest.mark.parametrize('method', ['swav', 'simclr'])
def test_two_processes_learn_what_one_does(method, images, tmp_path, start):
    args = 'examples/pretrain.py', images, *tiny, '--method', method, '--epochs', 5
    runs = [start(sys.executable, *args, '--bs', 64, '--out', tmp_path/'1'), start(*torchrun(2), *args, '--bs', 32, '--out', tmp_path/'2')]
    losses = [check_run(p, tmp_path/f'{i}', epochs=5)[-1] for i,p in enumerate(runs, 1)]
    *untrained,one,two = accuracy([*(tiny_encoder() for _ in range(3)), *(load_encoder(tmp_path/f'{i}'/'encoder.safetensors') for i in (1,2))])
    assert min(one, two) > np.mean(untrained)+.03
    assert abs(one-two) < .05
    assert abs(losses[0]-losses[1]) < .25

def test_slurm(images, tmp_path, start):
    "The batch file, on two machines that are this one"
    stubs = {'scontrol':'[[ "$*" == "show hostnames a[1-2]" ]] && echo localhost && echo elsewhere',
             'srun':'echo "$@" > $0.args; while [[ $1 == --* ]]; do shift; done; "$@" & "$@" && wait $!'}
    for nm,body in stubs.items():
        (tmp_path/nm).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path/nm).chmod(0o755)
    port = free_port(range(20000, 30000)) # the batch file makes it of the job's number
    p = start('bash', 'examples/pretrain.sbatch', images/'few', *tiny, '--method', 'simclr', '--bs', 32, '--epochs', 2, '--out', tmp_path/'out',
              PATH=f'{tmp_path}:{Path(sys.executable).parent}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='a[1-2]', SLURM_NNODES='2',
              SLURM_JOB_ID=str(port-20000), SLURM_GPUS_ON_NODE='1', SLURM_CPUS_PER_TASK='1')
    check_run(p, tmp_path/'out', epochs=2)
    assert f'--rdzv-endpoint localhost:{port} ' in (tmp_path/'srun.args').read_text() # torchrun has a default that would do here, but not on two machines

@pytest.fixture(scope='module')
def script(project):
    spec = importlib.util.spec_from_file_location('pretrain', project/'examples'/'pretrain.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_commands_in_the_texts(script, project):
    "The batch file is valid bash, and the script knows the options of the commands that it and the script show"
    batch = project/'examples'/'pretrain.sbatch'
    assert subprocess.run(['bash', '-n', batch], capture_output=True).stderr==b''
    shown = re.findall(r'examples/pretrain\.(?:py|sbatch) (images .*)', script.__doc__+batch.read_text())
    assert len(shown)==4
    for o in shown: assert anno_parser(script.main).parse_args(shlex.split(o)).method in ssl_methods()

def test_wrong_use(script, images, tmp_path):
    with pytest.raises(CliError, match='byol is unknown.*simclr.*swav|byol is unknown.*swav.*simclr'): script.main(images/'few', 'byol', 'test_mambaout')
    with pytest.raises(ValueError, match='no image'): script.main(tmp_path)

# Each rank gets another --out, to see what it writes.
@pytest.mark.parametrize('how,seconds,message', [(signal.SIGKILL, 600, 'closed|reset'), (signal.SIGSTOP, 10, 'Timed out|timed out|[Tt]imeout')])
def test_a_rank_dies_or_hangs(how, seconds, message, images, tmp_path, start):
    env = dict(WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(free_port()))
    ranks = [start(sys.executable, 'examples/pretrain.py', images/'few', *tiny, '--bs', 32, '--epochs', 1000, '--minutes', 1e-4, '--timeout', seconds,
                   '--out', tmp_path/f'{r}', RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    wait_until(lambda: len(rows(ranks[0].out()))>1, ranks[0])
    ranks[1].send_signal(how)
    assert ranks[0].wait(60)!=0 # seconds; without --timeout a rank waits for 30 minutes. After the error gloo's threads may abort it (-6)
    assert re.search(f'Error: .*({message})', ranks[0].err()), ranks[0].err()
    check_saved(tmp_path/'0', rows(ranks[0].out()))
    assert not list((tmp_path/'1').iterdir()) and not ranks[1].out()

def test_torchrun_ends_when_a_rank_dies(images, tmp_path, start):
    p = start(*torchrun(2), 'examples/pretrain.py', images/'few', *tiny, '--bs', 32, '--epochs', 1000, '--minutes', 1e-4, '--out', tmp_path/'out')
    wait_until(lambda: len(rows(p.out()))>1, p)
    next(o for o in psutil.Process(p.pid).children(recursive=True) if o.environ().get('RANK')=='1').kill()
    assert p.wait(60)>0
    check_saved(tmp_path/'out', rows(p.out()))

def test_killed_while_saving(images, tmp_path, start):
    "Killed with half of a checkpoint written; the same command again goes on, and its table with it"
    (tmp_path/'run.py').write_text('''
import io, os, runpy, signal, sys, torch
save,n = torch.save,0
def dying(obj, f, **kwargs):
    global n
    n += 1
    if n<11: return save(obj, f, **kwargs)
    whole = io.BytesIO()
    save(obj, whole, **kwargs)
    f.write(whole.getvalue()[:len(whole.getvalue())//2])
    f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save,sys.argv = dying,sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
''')
    args = 'examples/pretrain.py', images/'few', *tiny, '--bs', 64, '--epochs', 4, '--minutes', 1e-4, '--out', tmp_path/'out'
    p = start(sys.executable, tmp_path/'run.py', *args)
    assert p.wait(120)==-signal.SIGKILL, p.err()
    first = rows(p.out())
    check_saved(tmp_path/'out', first)
    p = start(sys.executable, *args)
    assert p.wait(120)==0, p.err()
    epochs = [int(o) for o in re.findall(r'^\W*(\d+) +\S+ +None', p.out(), re.M)]
    assert 'Going on from' in p.out() and epochs==list(range(len(first), 4)) and (tmp_path/'out'/'encoder.safetensors').exists()
