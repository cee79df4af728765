"The commands alone, with torchrun and under Slurm; what they refuse; and what is left when a process dies"
import csv, json, math, os, re, shlex, signal, socket, subprocess, sys, time, uuid
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np, psutil, pytest, timm, torch, torchvision
from PIL import Image

import processes
from self_supervised import cli, cli_judge, cli_log, cli_pretrain, methods
from self_supervised.all import (create_encoder, create_swav_model, encoder_info, fashion_mnist, fine_tune, knn, linear_probe, load_encoder, read_checked,
                                 sgd_probe, tensor_dls, write_atomic)
from self_supervised.cli_command import ask_package, flags_file, parse as parse_words
from self_supervised.cli_judge import cut_sizes, labelled_dls, open_encoder
from self_supervised.pretrained import create_official_model
from self_supervised.recipes import Recipe, get_recipe, recipes, setting_info
from self_supervised.shards import write_shards
from self_supervised.vision.supcon import SupCon

n_images = 2048
n_few,steps_per_epoch = 256,4 # in the runs that are cut short, with 64 images a step
n_labelled = 600,200
small = ('--arch test_mambaout --no-low-resolution --n-in 1 --hidden-size 256 --bs 64 --lr .0021 --lr-start .0002 --lr-final 2e-6 --warmup-epochs 1 '
         '--workers 0').split()
swav  = '--recipe swav_small --n-protos 30'.split()
tiny  = [*swav, *small]
kinds = {'swav':tiny, 'simclr':['--recipe', 'simclr_small', *small]}

def tiny_encoder(): return create_encoder('test_mambaout', pretrained=False, n_in=1, pool_type='avg')

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "The first images of the embedded Fashion-MNIST, as files; those in few/ are for runs where nothing is learned, labelled/ has train/ and val/"
    path = tmp_path_factory.mktemp('images')
    def save(x, fn):
        fn.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(fn)
    train,test = fashion_mnist()
    for i,x in enumerate(train[0][:n_images]): save(x, path/'all'/('few' if i<n_few else '')/f'{i:04}.png')
    for nm,(xs,ys),n in zip(('train','val'), (train,test), n_labelled):
        for i,(x,y) in enumerate(zip(xs[:n], ys)): save(x, path/'labelled'/nm/f'class{y}'/f'{i:04}.png')
    return path

def labelled(bs=256):
    "The labelled images in the order of their files"
    parts = [(x[:n][o],y[:n][o]) for (x,y),n in zip(fashion_mnist(), n_labelled) for o in [y[:n].argsort(stable=True)]]
    return tensor_dls(*parts, bs=bs, drop_last=False)

@pytest.fixture
def start(project, tmp_path):
    "Start a command, from the parent that has imported the package or, if it is none of Python's, by itself; whatever is left of it at the end of the test is killed"
    tag,running = uuid.uuid4().hex,ExitStack()
    def _start(*cmd, **env):
        env = {**os.environ, 'PATH':f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'OMP_NUM_THREADS':'1', 'CLI_TEST':tag, **env}
        if cmd[0]!='bash': return running.enter_context(processes.start(*cmd, cwd=project, env=env))
        out,err = (tmp_path/f'{uuid.uuid4().hex}.{o}' for o in ('out','err'))
        with out.open('w') as o, err.open('w') as e: p = subprocess.Popen([str(c) for c in cmd], cwd=project, env=env, stdout=o, stderr=e, start_new_session=True)
        p.out,p.err = out.read_text,err.read_text
        return p
    with running: yield _start
    for p in psutil.process_iter(): # what torchrun started has a session of its own
        with suppress(psutil.Error): # ended meanwhile, or somebody else's
            if p.environ().get('CLI_TEST')==tag: p.kill()

def free_port(ports=(0,)): # 0: the system picks one
    for port in ports:
        with suppress(OSError), socket.socket() as s:
            s.bind(('localhost', port))
            return s.getsockname()[1]

def two_ranks(start, cmd, outs):
    "What torchrun starts, without the ten seconds that a new interpreter needs for its imports"
    env = dict(WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(free_port()))
    return [start(*cmd, '--out', o, RANK=str(r), LOCAL_RANK=str(r), **env) for r,o in enumerate(outs)]

def torchrun(n): return 'torchrun', '--nproc-per-node', n, '--master-port', free_port(), '--no-python'

def wait_until(ready, p, seconds=120):
    end = time.monotonic()+seconds
    while not ready():
        assert p.poll() is None and time.monotonic()<end, p.out()+p.err()
        time.sleep(.02)

def done(p):
    "The output of a command that must end well"
    assert p.wait(240)==0, p.out()+p.err()
    return p.out()

def rows(out):
    "Losses of the table that a run prints, which must not be there twice"
    assert len(re.findall(r'epoch +train_loss', out))<=1, out
    found = re.findall(r'^(\d+) +(\S+)', out, re.M)
    assert [int(i) for i,_ in found]==list(range(len(found))), out
    return [float(o) for _,o in found]

def history(out): return list(csv.DictReader((out/'history.csv').open()))

def check_run(p, out, epochs):
    "A run that must end well: its losses"
    txt = done(p)
    losses = rows(txt)
    assert len(losses)==epochs and all(map(math.isfinite, losses)), txt
    assert txt.count(f'{out}/encoder.safetensors')==1
    assert {o.name for o in out.iterdir()} >= {'checkpoints', 'encoder.safetensors', 'history.csv', 'settings.json', 'views.png', 'loss.png'}
    assert not list(out.glob('*.part'))
    assert [(int(o['epoch']), round(float(o['train_loss']), 6)) for o in history(out)]==[(i, pytest.approx(l, abs=2e-6)) for i,l in enumerate(losses)]
    return losses

def accuracy(encoders):
    "k-NN on images that the command has not seen"
    (x,y),test = fashion_mnist()
    dls = tensor_dls((x[:n_images],y[:n_images]), test, bs=500, drop_last=False)
    return [float(knn(o, dls)) for o in encoders]

def check_saved(out, done):
    "The newest checkpoint is whole, and of the first epoch that is not in the table, or its last step"
    saved = read_checked(max((out/'checkpoints').glob('*.ckpt')))
    create_swav_model(tiny_encoder(), hidden_size=256, n_protos=30).load_state_dict(saved['model'])
    assert 0 <= saved['train_iter']-steps_per_epoch*len(done) <= steps_per_epoch+1

# k-NN in %, seeds 42 to 44: SwAV 71.9, 72.5, 72.9 on one process and 72.0, 72.7, 73.0 on two, SimCLR (42, 43) 75.0, 74.1 and 75.4, 74.5; the
# untrained encoder 66.4 ± 1.5 (6 seeds). Losses at the end differ by up to 0.07; without the negatives of the other process SimCLR's would be
# lower by 0.6.
@pytest.mark.slow
def test_two_processes_learn_what_one_does(images, tmp_path, start):
    args = 'ssl_pretrain', images/'all', *kinds['simclr'], '--epochs', 5
    runs = [start(*args, '--out', tmp_path/'1'), two_ranks(start, args, [tmp_path/'2']*2)[0]]
    losses = [check_run(p, tmp_path/f'{i}', epochs=5)[-1] for i,p in enumerate(runs, 1)]
    *untrained,one,two = accuracy([*(tiny_encoder() for _ in range(3)), *(load_encoder(tmp_path/f'{i}'/'encoder.safetensors') for i in (1,2))])
    assert min(one, two) > np.mean(untrained)+.03
    assert abs(one-two) < .04
    assert abs(losses[0]-losses[1]) < .25

@pytest.mark.slow
def test_from_images_to_answers(images, tmp_path, start):
    "A run that Ctrl-C stops, an answer in between, the same command again, and all that can be asked and made of it"
    out,data = tmp_path/'run',images/'labelled'
    cmd = 'ssl_pretrain', images/'all'/'few', *tiny, '--epochs', 6, '--labelled', data, '--out', out
    p = start(*cmd)
    wait_until(lambda: len(rows(p.out()))>1, p)
    p.send_signal(signal.SIGINT)
    assert p.wait(60)==130, p.err()
    assert f'To go on, give the same command again: {shlex.join(map(str, cmd))}' in p.out() and 'Traceback' not in p.err()
    stopped = len(rows(p.out()))
    check_saved(out, rows(p.out()))
    again,early = start(*cmd, '--resume'),start('ssl_knn', out, data)
    assert 'checkpoint fit01-step' in done(early)
    assert 'Going on from' in done(again) and (out/'monitor.png').exists()
    assert [int(o['epoch']) for o in history(out)]==list(range(6)) and re.findall(r'^(\d+)  ', again.out(), re.M)==[str(i) for i in range(stopped, 6)]

    said = json.loads((out/'settings.json').read_text())
    want = get_recipe('swav_small', arch='test_mambaout', low_resolution=False, n_protos=30, hidden_size=256, bs=64, lr=.0021, lr_start=.0002, lr_final=2e-6, warmup_epochs=1., epochs=6)
    assert said['recipe']=='swav_small' and said['settings']==json.loads(json.dumps(want.settings))
    assert said['data']['images']==n_few and said['run']['n_in']==1 and said['versions']['torch'] and 'commit' in said

    asked = [start(*o) for o in (('ssl_knn', out, data, '--k', 10), ('ssl_linear', out, data, '--epochs', 3, '--bs', 64), ('ssl_semisup', out, data, '--pct', '10%', '--epochs', 3),
                                 ('ssl_export', out, '--out', tmp_path/'e.safetensors'))]
    said = [done(p) for p in asked]
    said.insert(2, str(cli.ssl_linear(str(out/'encoder.safetensors'), data, logistic=True)))
    encoder = load_encoder(out/'encoder.safetensors')
    views = labelled_dls(data, (28,28), (28,28), n_in=1, views=True) # crops are drawn by the loaders
    want = [knn(encoder, labelled(), k=10), sgd_probe(encoder, views, epochs=3, bs=64, resize_scale=None), linear_probe(encoder, labelled()),
            fine_tune(encoder, views, .1, epochs=3, resize_scale=None)]
    lines = [json.loads(o) for o in (out/'results.jsonl').read_text().splitlines()][1:] # the first is of the checkpoint
    found = {o['protocol']:o for o in lines}
    for r,txt in zip(want, said):
        assert txt.startswith(r.protocol+': ')
        assert found[r.protocol]['accuracy']==pytest.approx(r.accuracy, abs=.011), r # of 200 images, two
        assert f"{100*found[r.protocol]['accuracy']:.1f} %" in txt
    assert float(history(out)[-1]['knn'])==pytest.approx(float(knn(encoder, labelled())), abs=.011)
    assert encoder_info(tmp_path/'e.safetensors')==encoder_info(out/'encoder.safetensors')
    for a,b in zip(encoder.state_dict().values(), load_encoder(tmp_path/'e.safetensors').state_dict().values()): assert torch.equal(a, b)

def make_run(out, **settings):
    "The folder of a run that has got as far as a checkpoint; its model"
    r = get_recipe('swav_small', n_protos=30, hidden_size=64, low_resolution=False, pool_type='avg', **settings)
    learn = r.learner(tensor_dls(torch.zeros(4, 3, 28, 28), bs=2))
    for o in learn.model.modules():
        if isinstance(o, torch.nn.BatchNorm2d): o.running_mean.uniform_(-1, 1)
    (out/'checkpoints').mkdir(parents=True)
    (out/'settings.json').write_text(json.dumps(dict(recipe=r.name, method=r.method, settings=r.settings, run=dict(n_in=3))))
    write_atomic({'model':learn.model.state_dict()}, out/'checkpoints'/'fit01-step000000001.ckpt')
    return learn.model.eval()

def test_export_for_others(tmp_path):
    "Weights that torchvision, timm and the loader of official files read, and which give the same features there"
    x,a,b = torch.randn(2, 3, 64, 64),*(make_run(tmp_path/o, arch=o) for o in ('resnet18','resnet50'))
    def export(layout, arch='resnet18'): return torch.load(cli.ssl_export(str(tmp_path/arch), tmp_path/'out.pth', layout), weights_only=True)
    for layout,other in (('torchvision', torchvision.models.resnet18()), ('timm', timm.create_model('resnet18'))):
        assert set(other.load_state_dict(export(layout), strict=False).missing_keys)=={'fc.weight','fc.bias'}
        other.fc = torch.nn.Identity()
        torch.testing.assert_close(other.eval()(x), a.encoder(x), atol=1e-5, rtol=1e-5)
    state = export('official', 'resnet50')
    assert state['module.prototypes.weight'].equal(b.prototypes.weight) and {'module.projection_head.0.weight', 'module.conv1.weight'} <= set(state)
    torch.testing.assert_close(create_official_model(tmp_path/'out.pth').eval()([x])[0], b([x])[0], atol=1e-5, rtol=1e-5)
    encoder,size,stats = open_encoder(str(tmp_path/'out.pth')) # such a file is an encoder to ask about, in the normalisation of ImageNet
    torch.testing.assert_close(encoder.eval().cpu()(x), b.encoder(x), atol=1e-5, rtol=1e-5)
    assert size==224 and np.allclose(stats, ([.485,.456,.406], [.229,.224,.225]))
    with pytest.raises(ValueError, match='left over'): open_encoder(str(tmp_path/'out.pth'), 'resnet18')
    with pytest.raises(ValueError, match='hold ResNet-50s, not a resnet18'): export('official')

@pytest.mark.slow
def test_signals_to_all(images, tmp_path, start):
    "Slurm tells torchrun and its processes at once, and torchrun tells its processes again; a terminal tells the processes that read images too: the run is saved all the same"
    def run(how, sig, out, *args):
        p = start(*how, 'ssl_pretrain', images/'all'/'few', *tiny, '--epochs', 1000, '--out', out, *args)
        wait_until(lambda: len(rows(p.out()))>1, p)
        for o in [*psutil.Process(p.pid).children(recursive=True), p]: o.send_signal(sig)
        p.wait(60)
        assert 'To go on' in p.out(), p.out()+p.err()
        check_saved(out, rows(p.out()))
    run(torchrun(2), signal.SIGTERM, tmp_path/'1')
    run((), signal.SIGINT, tmp_path/'2', '--workers', 1)

@pytest.mark.slow
def test_slurm(images, tmp_path, start):
    "The batch file, on two machines that are this one"
    stubs = {'scontrol':'[[ "$*" == "show hostnames a[1-2]" ]] && echo localhost && echo elsewhere',
             'srun':'echo "$@" > $0.args; while [[ $1 == --* ]]; do shift; done; "$@" & "$@" && wait $!'}
    for nm,body in stubs.items():
        (tmp_path/nm).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path/nm).chmod(0o755)
    port = free_port(range(20000, 30000)) # the batch file makes it of the job's number
    p = start('bash', 'examples/pretrain.sbatch', images/'all'/'few', *kinds['simclr'], '--epochs', 2, '--out', tmp_path/'out',
              PATH=f'{tmp_path}:{Path(sys.executable).parent}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='a[1-2]', SLURM_NNODES='2',
              SLURM_JOB_ID=str(port-20000), SLURM_GPUS_ON_NODE='1', SLURM_CPUS_PER_TASK='1')
    check_run(p, tmp_path/'out', epochs=2)
    assert json.loads((tmp_path/'out'/'settings.json').read_text())['run']['processes']==2
    assert f'--rdzv-endpoint localhost:{port} ' in (tmp_path/'srun.args').read_text() # torchrun has a default that would do here, but not on two machines

# Each rank gets another --out, to see what it writes.
@pytest.mark.slow
@pytest.mark.parametrize('how,seconds,message', [(signal.SIGKILL, 600, 'closed|reset'), (signal.SIGSTOP, 10, 'Timed out|timed out|[Tt]imeout')])
def test_a_rank_dies_or_hangs(how, seconds, message, images, tmp_path, start):
    ranks = two_ranks(start, ('ssl_pretrain', images/'all'/'few', *tiny, '--epochs', 1000, '--minutes', 1e-4, '--timeout', seconds), [tmp_path/'0',tmp_path/'1'])
    wait_until(lambda: len(rows(ranks[0].out()))>1, ranks[0])
    ranks[1].send_signal(how)
    assert ranks[0].wait(60)!=0 # seconds; without --timeout a rank waits for 30 minutes. After the error gloo's threads may abort it (-6)
    assert re.search(f'Error: .*({message})', ranks[0].err()), ranks[0].err()
    check_saved(tmp_path/'0', rows(ranks[0].out()))
    assert not (tmp_path/'1').exists() and not ranks[1].out()

@pytest.mark.slow
def test_killed_while_saving(images, tmp_path, start):
    "Killed with half of a checkpoint written; the same command again goes on, and in the end everything is as if nothing had happened"
    (tmp_path/'run.py').write_text('''
import io, os, signal, torch
from self_supervised.cli import ssl_pretrain
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
torch.save = dying
ssl_pretrain()
''')
    args = images/'all'/'few', *tiny, '--epochs', 4, '--minutes', 1e-4, '--out'
    whole,p = start('ssl_pretrain', *args, tmp_path/'whole'),start(tmp_path/'run.py', *args, tmp_path/'out')
    assert p.wait(120)==-signal.SIGKILL, p.err()
    first = rows(p.out())
    check_saved(tmp_path/'out', first)
    p = start('ssl_pretrain', *args, tmp_path/'out')
    out = done(p)
    assert 'Going on from' in out and re.findall(r'^(\d+)  ', out, re.M)==[str(i) for i in range(len(first), 4)]
    check_run(whole, tmp_path/'whole', 4)
    a,b = ((tmp_path/o/'history.csv').read_text() for o in ('whole','out'))
    assert a==b and a.count('\n')==5
    a,b = (load_encoder(tmp_path/o/'encoder.safetensors').state_dict() for o in ('whole','out'))
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.slow
def test_loggers(images, tmp_path, start):
    "TensorBoard and W&B watch: the run is the same to the last bit"
    pytest.importorskip('tensorboard'), pytest.importorskip('wandb')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    args = 'ssl_pretrain', images/'all'/'few', *tiny, '--epochs', 2, '--out'
    runs = [start(*args, tmp_path/'0'), start(*args, tmp_path/'1', '--tensorboard', '--wandb', 'tests', WANDB_MODE='offline')]
    assert len({tuple(check_run(p, tmp_path/f'{i}', 2)) for i,p in enumerate(runs)})==1
    assert (tmp_path/'0'/'history.csv').read_text()==(tmp_path/'1'/'history.csv').read_text()
    board = EventAccumulator(str(tmp_path/'1'/'tensorboard')).Reload()
    assert len(board.Scalars('train_loss'))==2*steps_per_epoch
    assert [o.value for o in board.Scalars('epoch/train_loss')]==pytest.approx([float(o['train_loss']) for o in history(tmp_path/'1')])
    assert list((tmp_path/'1'/'wandb').glob('offline-run-*/*.wandb'))
    assert 'Going on from' in done(start(*args, tmp_path/'1')) # without them

@pytest.mark.filterwarnings('ignore:images with 1 channel')
def test_pictures_leave_no_trace(tmp_path):
    learn = get_recipe('swav_small', arch='test_mambaout').learner(tensor_dls(fashion_mnist()[0][0][:20], bs=10), path=tmp_path)
    before = torch.random.get_rng_state(),learn.dls.train.rng.getstate()
    cli_log.save_views(learn)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1]==learn.dls.train.rng.getstate()
    assert Image.open(tmp_path/'views.png').size[0]>300

# Wrong use. Neither PyTorch nor what needs it can be imported here, so whatever is said is said before it would be.
@pytest.fixture
def refused(monkeypatch, capsys):
    "What a command says"
    for k in list(sys.modules):
        if k.startswith('self_supervised.') and not k.startswith('self_supervised.cli'): monkeypatch.delitem(sys.modules, k)
    for k in ('torch','fastai','timm'): monkeypatch.setitem(sys.modules, k, None)
    def _refused(*words, cwd='.', **env):
        with monkeypatch.context() as m:
            m.chdir(cwd)
            m.setattr(sys, 'argv', [str(o) for o in words])
            for k,v in env.items(): m.setenv(k, v)
            with pytest.raises(SystemExit) as e: getattr(cli, words[0])()
        said = capsys.readouterr()
        assert e.value.code and not said.out
        return said.err+(e.value.code if isinstance(e.value.code, str) else '')
    return _refused

def test_answers_need_no_torch(images, tmp_path):
    "The same in a process of its own: help of all commands, and two mistakes"
    code = """
import sys, json
for o in ('torch', 'fastai', 'timm'): sys.modules[o] = None
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from self_supervised import cli
said = []
for words in json.load(sys.stdin):
    sys.argv = words
    with redirect_stdout(StringIO()) as o, redirect_stderr(StringIO()) as e:
        try: getattr(cli, words[0])()
        except SystemExit as x: code = x.code
    said.append((o.getvalue(), e.getvalue(), code))
print(json.dumps(said))
"""
    asked = [[o, '--help'] for o in cli.__all__]+[['ssl_pretrain', f'{images}/all', '--recipe', 'swav_smal'], ['ssl_linear', 'x', '--lrr', '1']]
    r = subprocess.run([sys.executable, '-c', code], input=json.dumps(asked), capture_output=True, text=True, cwd=tmp_path)
    assert not r.returncode, r.stderr
    *helps,recipe,flag = json.loads(r.stdout)
    assert all(o.startswith('usage: ') and not e and code==0 for o,e,code in helps)
    assert recipe==['', '', 'ssl_pretrain: --recipe swav_smal is unknown: did you mean swav_small, sela_small, simsiam_small?'] and '--lrr is unknown: did you mean --lr?' in flag[1] and flag[2]==2

@pytest.mark.parametrize('words,says', [
    ('IMG --recipe swav_smal',                       r'swav_smal is unknown: did you mean swav_small'),
    ('IMG',                                          r'required: --recipe'),
    ('IMG --recipe swav_small --n-prots 30',         r'--n-prots is unknown: did you mean --n-protos'),
    ('IMG --recipe swav_small --epochs many',        r"--epochs: 'many' must be of type int"),
    ('IMG --recipe swav_small --crop-sizes 28 x',    r"--crop-sizes: 'x' must be number"),
    ('IMG --recipe swav_small --K some',             r"--K: 'some' must be of type int, or none"),
    ('IMG x --recipe swav_small',                    r'x is not a folder'),
    ('IMG --recipe swav_small x',                    r'x is unknown: is it one word too many'),
    ('IMGS --recipe swav_small',                     r'not a folder: did you mean all'),
    ('/no/such/place --recipe swav_small',           r'there is no /no/such either'),
    ('EMPTY --recipe swav_small',                    r'no image in the folder .* or below it'),
    ('IMG --recipe swav_small --labelled EMPTY',     r'no image in'),
    ('IMG --recipe swav_small --labelled FEW',       r'one folder for each class'),
    ('IMG --recipe swav_small --out IMG/0300.png',   r'is a file: give a folder'),
    ('IMG --recipe swav_small --out EMPTY --resume', r'no run in .* to go on with'),
    ('IMG --recipe swav_small --out EMPTY --override data', r'--override: there is no run in .* to go on with'),
    ('IMG --recipe swav_small --out IMG',            r'holds 0256.png, 0257.png, 0258.png … and no run of this command: files there might be overwritten'),
])
def test_wrong_pretraining(words, says, images, tmp_path, refused):
    (tmp_path/'empty').mkdir()
    words = words.replace('IMGS', f'{images}/al').replace('IMG', f'{images}/all').replace('EMPTY', f'{tmp_path}/empty').replace('FEW', f'{images}/all/few')
    assert re.search(says, refused('ssl_pretrain', *words.split()))
    assert list(tmp_path.iterdir())==[tmp_path/'empty'] and not list((tmp_path/'empty').iterdir())

@pytest.mark.parametrize('words,says', [
    ('ssl_knn RUN',                                  r'required: data'),
    ('ssl_knn RUM DATA',                             r'is not a folder of a run'),
    ('ssl_knn DATA DATA',                            r'is not a folder of a run'),
    ('ssl_knn RUN FEW',                              r'one folder for each class'),
    ('ssl_linear RUN DATA --schedule poly',          r"invalid choice: 'poly'"),
    ('ssl_linear RUN DATA --n-per-class 5',          r'belongs to --logistic'),
    ('ssl_knn RUN DATA --results /no/such/x',        r'must be a file in a folder that there is'),
    ('ssl_semisup RUN DATA',                         r'give --pct \(1%, 10%\) or --n-per-class'),
    ('ssl_semisup RUN DATA --pct 1',                 r'write 1% or 100%'),
    ('ssl_semisup RUN DATA --pct 0',                 r"'0' must be a part of the labels"),
    ('ssl_export RUN',                               r'required: --out'),
    ('ssl_export random:resnet18 --out x',           r'is no run of yours'),
    ('ssl_export RUN --out DATA',                    r'must be a file in a folder'),
    ('ssl_export swav_800ep --out x',                r'is no run of yours'),
    ('ssl_knn swav_80ep DATA',                       r'did you mean swav_800ep'),
])
def test_wrong_questions(words, says, images, tmp_path, refused):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'encoder.safetensors').touch()
    for k,v in dict(RUN=tmp_path/'run', RUM=tmp_path/'rum', DATA=images/'labelled', FEW=images/'all'/'few').items(): words = words.replace(k, str(v))
    assert re.search(says, refused(*words.split(), cwd=tmp_path))
    assert {o.name for o in tmp_path.iterdir()}=={'run'}

def test_questions_on_one_process(images, tmp_path, refused): assert 'start it without torchrun' in refused('ssl_knn', 'random:resnet18', images/'labelled', cwd=tmp_path, WORLD_SIZE='2')

def test_missing_loggers(images, monkeypatch):
    monkeypatch.setattr(cli_pretrain, 'find_spec', lambda nm: None)
    for kw in (dict(tensorboard=True), dict(wandb='x')):
        with pytest.raises(ValueError, match=r"not installed: pip install 'self_supervised\[log\]'"): cli.ssl_pretrain(images/'all', 'swav_small', **kw)

def run_folder(out):
    "The folder of a run, as far as its settings; they"
    r   = get_recipe('swav_small', bs=64)
    run = dict(n_in=1, load_size=None, squares=False, checkpointing=False, seed=42, labelled=False, processes=1)
    (out/'settings.json').write_text(json.dumps(dict(recipe='swav_small', run=run, settings=r.settings)))
    cli_pretrain._check_same(out, dict(recipe='simclr_small')) # nothing was saved yet
    (out/'checkpoints').mkdir()
    (out/'checkpoints'/'fit01-step000000001.ckpt').touch()
    return dict(recipe='swav_small', **run, **r.settings)

# What is in the folder of a run

def few(folder, n=24, seed=0, size=30):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(np.random.default_rng([seed,i]).integers(0, 255, (size,size), dtype=np.uint8)).save(folder/f'{i:02}.png')
    return folder

def quick(source, out, **kwargs):
    "A run in this process, of three steps an epoch"
    return cli.ssl_pretrain(source, out=out, **{**dict(recipe='swav_small', n_in=1, arch='test_mambaout', low_resolution=False, hidden_size=16, bs=8, warmup_epochs=0., n_protos=5, workers=0, epochs=1), **kwargs})

def test_precision_is_written_down_and_kept(tmp_path, monkeypatch):
    "What the card computes in, which is pretended; a run goes on in it on another machine; a flag comes first"
    def said(run): return json.loads((tmp_path/run/'settings.json').read_text())['settings']['precision']
    photos,kw = few(tmp_path/'photos'),dict(recipe='swav_200ep_bs256', num_crops=(2,), crop_sizes=(16,), min_scales=(.5,), max_scales=(1.,), lr=.1)
    monkeypatch.setattr(Recipe, 'precision_on', lambda self, device: 'bf16' if self.precision=='auto' else 'fp32') # and trains on a CPU
    quick(photos, tmp_path/'a', **kw)
    assert said('a')=='bf16'
    monkeypatch.undo()
    quick(photos, tmp_path/'a', **kw, extend=1)
    with pytest.raises(ValueError, match='precision: bf16 → fp32'): quick(photos, tmp_path/'a', **kw, epochs=2, precision='fp32')
    quick(photos, tmp_path/'b', **kw); quick(photos, tmp_path/'c', **kw, precision='fp16')
    assert [said(o) for o in 'abc']==['bf16','fp32','fp16']

def test_classes_are_folders(tmp_path, monkeypatch):
    "for a recipe that learns from labels; others do not look at folders, and one folder is no class"
    for i,nm in enumerate(('cat','ant','bee')): few(tmp_path/'photos'/nm, n=8, seed=i)
    seen,ks = [],dict(n_in=1, arch='test_mambaout', low_resolution=False, hidden_size=16, bs=8, warmup_epochs=0., workers=0, epochs=1)
    def lf(self, pred):
        seen.extend(self.y.tolist())
        return pred.mean()
    monkeypatch.setattr(SupCon, 'lf', lf)
    cli.ssl_pretrain(tmp_path/'photos', 'supcon_small', out=tmp_path/'run', **ks)
    assert Counter(seen)=={0:8, 1:8, 2:8}
    assert json.loads((tmp_path/'run/settings.json').read_text())['data']['classes']==['ant','bee','cat']
    with pytest.raises(ValueError, match='supcon_small learns from labels, and all images lie in one folder, ant'): cli.ssl_pretrain(tmp_path/'photos/ant', 'supcon_small', out=tmp_path/'other', **ks)
    quick(tmp_path/'photos', tmp_path/'third')
    assert 'classes' not in json.loads((tmp_path/'third/settings.json').read_text())['data']

@pytest.mark.parametrize('label, says', [(None, 'has none'), (lambda o: o.parent.name, "has b'cat'")])
def test_shards_without_numbers(tmp_path, label, says):
    "for a recipe that learns from labels"
    few(tmp_path/'photos'/'cat', n=8)
    write_shards(tmp_path/'photos', tmp_path/'shards', label_func=label)
    with pytest.raises(ValueError, match=f'{says}, where a number in a field cls or label is needed: write shards with ssl_shards --labels'):
        cli.ssl_pretrain(tmp_path/'shards', 'supcon_small', out=tmp_path/'run', n_in=1, arch='test_mambaout', low_resolution=False, hidden_size=16, bs=8, warmup_epochs=0., epochs=1)

def held(folder):
    "What is in the files; the header of an encoder has no order"
    def read(f): return {k:v.tolist() for k,v in load_encoder(f).state_dict().items()} if f.name=='encoder.safetensors' and f.stat().st_size else f.read_bytes()
    return {o.relative_to(folder):read(o) for o in folder.rglob('*') if o.is_file()}

@pytest.mark.parametrize('files', [{'settings.json':'{}'}, {'settings.json':'[1]'}, {'loss.png':''}, {'encoder.safetensors':''}, {'sub/x.txt':''}], ids=lambda o: next(iter(o)))
def test_foreign_folder(images, tmp_path, files):
    "is left as it is"
    for k,v in files.items(): (tmp_path/k).parent.mkdir(exist_ok=True); (tmp_path/k).write_text(v)
    before = held(tmp_path)
    with pytest.raises(ValueError, match='might be overwritten|would overwrite'): cli.ssl_pretrain(images/'all', 'swav_small', tmp_path, n_in=1)
    assert held(tmp_path)==before
    (tmp_path/'hidden').mkdir(); (tmp_path/'hidden'/'.keep').touch()
    cli_pretrain._check_out(tmp_path/'hidden') # counts as empty

def test_life_of_a_run(tmp_path, capsys):
    "Finished, given again, with its images moved, changed, lost and new; with its checkpoints gone. Nothing is said to be ready that is not, and nothing overwritten"
    im,run = few(tmp_path/'im'),tmp_path/'im'/'run' # among the images, so that its own pictures lie there too
    assert quick(im, run)==0
    said = capsys.readouterr().out
    assert 'The encoder is in' in said and sorted(o.name for o in run.iterdir())==['checkpoints', 'encoder.safetensors', 'history.csv', 'images.txt', 'loss.png', 'monitor.png', 'settings.json', 'views.png']
    assert (run/'images.txt').read_text().splitlines()==[f'{i:02}.png' for i in range(24)]
    before = held(run)
    def same(): now = held(run); return all(now[k]==v for k,v in before.items() if k.name not in ('loss.png','monitor.png'))

    few(im/'new', 3)
    assert quick(im, run)==0 and same()
    said = capsys.readouterr().out
    assert 'where it ended' in said and f'3 images have come to {im}' in said
    (tmp_path/'im').rename(tmp_path/'moved'); im,run = tmp_path/'moved',tmp_path/'moved'/'run'
    assert quick(im, run)==0 and same()

    capsys.readouterr()
    other = few(tmp_path/'other', 24, seed=1)
    for change,named in ((lambda: None, 'data.contents'), (lambda: few(other, 24, seed=1, size=40), 'data.sizes'), (lambda: (other/'05.png').unlink(), '1 of the 24 images .*05.png'), (lambda: (other/'04.png').rename(other/'x.png'), '2 of the 24 images .*04.png, 05.png')):
        change()
        with pytest.raises(ValueError, match=f'(?s){named}.*--override data'): quick(other, run)
        assert 'The encoder is in' not in capsys.readouterr().out and same()
    with pytest.raises(ValueError, match=r'epochs: 1 → 2.*--override epochs'): quick(im, run, epochs=2)
    with pytest.raises(ValueError, match=r'(?s)n_epoch: 1 → 2.*--override epochs n_epoch '): quick(im, run, epochs=2, override=['epochs'])
    with pytest.raises(ValueError, match='override.*epoch_s.*no such settings'): quick(im, run, override=['epoch_s'])
    assert same()
    names = 'epochs n_epoch data'.split()
    assert quick(other, run, epochs=2, override=names)==0 and [int(o['epoch']) for o in history(run)]==[0,1]
    assert len((run/'images.txt').read_text().splitlines())==23 and json.loads((run/'settings.json').read_text())['data']==dict(source=str(other), images=23, labelled=None, max_value=None, background='white')

    for f in (run/'checkpoints').iterdir(): f.unlink()
    before = held(run)
    for kwargs in (dict(epochs=2), dict(temp=.2)):
        with pytest.raises(ValueError, match='holds an encoder, and no checkpoints'): quick(im, run, **kwargs)
    assert held(run)==before

def test_heads_of_released_weights(tmp_path, monkeypatch, capsys):
    "A run that begins with weights of other heads than its recipe builds is refused before it has a folder, with the flag; with it the run goes on, and is judged, as it began"
    moco,vit = methods._methods['moco'],timm.create_model('test_vit', num_classes=0, num_heads=4)
    monkeypatch.setitem(methods._methods, 'moco', moco._replace(weights=dict(tiny_vit=methods.OfficialWeights('test_vit', 'MoCo v3', 1, 8, '2×224', 1., 'file:///nowhere/tiny.pth', 'base_encoder.', 'head.', dict(num_heads=4)))))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    torch.save({f'module.base_encoder.{k}':v for k,v in vit.state_dict().items()} | {'module.base_encoder.head.0.weight':torch.ones(2,2)}, tmp_path/'checkpoints'/'tiny.pth')
    im,run = few(tmp_path/'im'/'a'),tmp_path/'run'
    few(tmp_path/'im'/'b', seed=1)
    words = [*f'ssl_pretrain {im} --recipe moco_v3_vits_300ep --arch test_vit --bs 8 --size 32 --hidden-size 16 --projection-size 8 --warmup-epochs 0 --workers 0 --epochs 1 --lr 1e-5'.split()]
    def start(*more):
        monkeypatch.setattr(sys, 'argv', [*words, *map(str, more)])
        cli.ssl_pretrain()
    def refused(*more):
        with pytest.raises(SystemExit) as e: start(*more)
        return e.value.code
    def features(enc):
        with torch.no_grad(): return enc.eval().cpu()(torch.linspace(-1, 1, 2*3*32*32).view(2,3,32,32))

    assert re.search(r'--num-heads 12 does not fit test_vit .*: --num-heads none keeps', refused('--out', run)) # those of the recipe
    for w in ('tiny_vit', tmp_path/'checkpoints'/'tiny.pth'):
        assert re.search(rf'{w} needs an encoder with --num-heads 4, that of moco_v3_vits_300ep has --num-heads 2.*Build it with --num-heads 4', refused('--init', w, '--num-heads', 'none', '--out', run))
    assert not run.exists()
    start('--init', 'tiny_vit', '--num-heads', 4, '--out', run)
    want = features(load_encoder(run)) # the encoder that was trained
    assert encoder_info(run)['attention_heads']==[4]*6 and (want-features(vit)).abs().max()<.1*(want-features(create_encoder('test_vit', pretrained=False))).abs().max()
    own = (run/'encoder.safetensors').rename(tmp_path/'own.safetensors')
    assert torch.equal(features(open_encoder(str(run))[0]), want) # from the checkpoint, built from the recipe
    assert cli.ssl_knn(str(run), tmp_path/'im', size=32, k=2).settings['train']>0
    start('--init', 'tiny_vit', '--num-heads', 4, '--out', run)
    assert 'where it ended' in capsys.readouterr().out and torch.equal(features(load_encoder(run)), want)

    for w in (own, run): assert re.search(r'encoder with --num-heads 4, this VisionTransformer has --num-heads 2.*Build it with --num-heads 4', refused('--init', w, '--num-heads', 'none', '--out', tmp_path/'two'))
    assert not (tmp_path/'two').exists()

def test_released_weights_without_a_recipe(tmp_path, monkeypatch):
    "of their name are judged with ImageNet's colours"
    moco,net = methods._methods['moco'],create_encoder('test_resnet', pretrained=False, pool_type='avg')
    monkeypatch.setitem(methods._methods, 'moco', moco._replace(weights=dict(tiny_resnet=methods.OfficialWeights('test_resnet', 'x', 1, 8, '2×224', 1., 'file:///nowhere/tiny.pth'))))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    torch.save(net.state_dict(), tmp_path/'checkpoints'/'tiny.pth')
    encoder,_,stats = open_encoder('tiny_resnet')
    assert np.allclose(stats, ([.485,.456,.406], [.229,.224,.225])) and all(torch.equal(a.cpu(), b) for a,b in zip(encoder.state_dict().values(), net.state_dict().values(), strict=True))

def test_a_damaged_image_is_deleted(tmp_path, capsys):
    "The run that it stopped goes on from the shell, with what is left"
    im,run = few(tmp_path/'im'),tmp_path/'run'
    good = (im/'11.png').read_bytes()
    from self_supervised.checkpoint import Checkpoint
    def broken(self): # after the first epoch the file is cut short
        if self.epoch==0: (im/'11.png').write_bytes(good[:100])
        return after(self)
    after = Checkpoint.after_epoch
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', broken)
        with pytest.raises(ValueError, match='11.png'): quick(im, run, epochs=3, minutes=1e-6)
    (im/'11.png').unlink()
    with pytest.raises(ValueError, match='1 of the 24 images of the run .*11.png.*--override data'): quick(im, run, epochs=3)
    capsys.readouterr()
    assert quick(im, run, epochs=3, override=['data'])==0
    said = capsys.readouterr().out
    assert 'The encoder is in' in said and len(history(run))==3 and len((run/'images.txt').read_text().splitlines())==23
    assert quick(im, run, epochs=3)==0 # and from now on that is the run

@pytest.mark.parametrize('epochs', [1, 3])
def test_a_run_of_nan(tmp_path, capsys, monkeypatch, epochs):
    "ends with one line and a status, and has no encoder"
    im,run = few(tmp_path/'im'),tmp_path/'run'
    words = ['ssl_pretrain', im, '--recipe', 'swav_small', '--n-in', 1, '--arch', 'test_mambaout', '--no-low-resolution', '--hidden-size', 16, '--bs', 8, '--warmup-epochs', 0, '--n-protos', 5, '--workers', 0, '--epochs', epochs,
             '--lr', 1e8, '--lr-start', 1e8, '--lr-final', 1e8, '--out', run]
    monkeypatch.setattr(sys, 'argv', [str(o) for o in words])
    with pytest.raises(SystemExit) as e: cli.ssl_pretrain()
    assert re.match('ssl_pretrain: the run has diverged.*--lr with a smaller value', e.value.code) and 'Exception occured' not in e.value.code
    assert 'The encoder is in' not in capsys.readouterr().out and not (run/'encoder.safetensors').exists()
    assert not (run/'history.csv').exists() and not (run/'checkpoints').exists()

def test_a_run_that_becomes_nan(tmp_path, monkeypatch):
    "names its last good checkpoint, which is still there and can be gone on from"
    im,run = few(tmp_path/'im'),tmp_path/'run'
    from self_supervised.checkpoint import Checkpoint
    after = Checkpoint.after_epoch
    def spoil(self):
        after(self)
        if self.epoch==1:
            with torch.no_grad(): next(self.model.parameters()).fill_(float('nan'))
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', spoil)
        with pytest.raises(FloatingPointError, match='diverged.*The last good checkpoint is .*fit01-step000000006.ckpt.*--override lr param_scheduler.lr'): quick(im, run, epochs=4, minutes=1e-6)
    assert quick(im, run, epochs=4)==0 and len(history(run))==4

def test_encoder_comes_before_the_pictures(tmp_path, monkeypatch):
    "which may fail"
    def fail(*args): raise RuntimeError('no display')
    monkeypatch.setattr(cli_pretrain, 'save_curves', fail)
    with pytest.raises(RuntimeError): quick(few(tmp_path/'im'), tmp_path/'run')
    assert (tmp_path/'run'/'encoder.safetensors').exists()

def test_other_settings(images, tmp_path):
    "A run is not gone on with under other settings: those of the recipe are compared before anything is built"
    same = run_folder(tmp_path)
    with pytest.raises(ValueError, match=r'bs: 64 → 128'): cli.ssl_pretrain(images/'all', 'swav_small', tmp_path, n_in=1)
    with pytest.raises(ValueError, match=r'temp2: not set → 1'): cli_pretrain._check_same(tmp_path, dict(temp2=1))
    cli_pretrain._check_same(tmp_path, same | dict(temp2=None)) # a setting that was not there then, and is not given

def test_other_settings_that_are_given(images, tmp_path, request):
    "are compared before anything is imported"
    run_folder(tmp_path)
    said = request.getfixturevalue('refused')('ssl_pretrain', images/'all', '--recipe', 'swav_small', '--n-in', 1, '--bs', 32, '--crop-sizes', 32, 16, '--out', tmp_path)
    assert 'bs: 64 → 32; crop_sizes: [28, 14] → [32, 16]' in said and 'another --out' in said

def test_wrong_after_all(images, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(ValueError, match='--bs 64 is the batch of all 3 processes'): cli.ssl_pretrain(images/'all', 'swav_small', tmp_path/'out', n_in=1, bs=64)
    monkeypatch.setenv('WORLD_SIZE', '1')
    with pytest.raises(ValueError, match='n_protos is no setting of a simclr'): cli.ssl_pretrain(images/'all', 'simclr_small', tmp_path/'out', n_protos=3)
    assert not (tmp_path/'out').exists()

def test_labelled_data(images, tmp_path):
    for i in range(10): Image.new('L', (8,8)).save(tmp_path/f'{i}.png') # beside the classes: left out
    for i,c in enumerate('aab'*5):
        (tmp_path/c).mkdir(exist_ok=True)
        Image.fromarray(np.full((10,20), 10*(c=='b')+i, dtype=np.uint8)).save(tmp_path/c/f'{i}.png')
    with pytest.warns(UserWarning, match='10 images lie in .* itself, beside the folders'): dls = labelled_dls(tmp_path, (8,8), (8,8), n_in=1, valid_pct=.4)
    assert [len(o.dataset) for o in dls]==[9,6] and dls.vocab==['a','b']
    shown = [o for dl in dls for x,y in dl for o in zip((255*x[:,0,0,0]).round().int().tolist(), y.tolist())]
    assert len(shown)==15 and set(shown)=={(10*(c=='b')+i, int(c=='b')) for i,c in enumerate('aab'*5)}
    with pytest.raises(ValueError, match='valid_pct=0.*leaves none'): labelled_dls(tmp_path, (8,8), (8,8), n_in=1, valid_pct=0)
    (tmp_path/'val'/'c').mkdir(parents=True)
    Image.new('L', (8,8)).save(tmp_path/'val'/'c'/'1.png')
    (tmp_path/'train').mkdir()
    for c in 'ab': (tmp_path/c).rename(tmp_path/'train'/c)
    with pytest.raises(ValueError, match='val has classes without training images: c'): labelled_dls(tmp_path, (8,8), (8,8), n_in=1)
    for f in (tmp_path/'train'/'b').iterdir(): f.unlink()
    with pytest.raises(ValueError, match='images of one class only, a'): labelled_dls(tmp_path, (8,8), (8,8), n_in=1)

def test_centre():
    "The shorter side to 256, the centre of 224: as torchvision does it"
    from torchvision.transforms import v2
    x = torch.rand(1, 3, 40, 60)
    im = v2.functional.to_pil_image(torch.nn.functional.interpolate(x, (300,450), mode='bicubic')[0].clamp(0, 1))
    want = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(im).float()
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        im.save(f'{d}/x.png')
        size,resize = cut_sizes(224)
        got = cli_judge._open_centre(f'{d}/x.png', resize, size, n_in=3).float()
    assert got.shape==want.shape and (got-want).abs().mean()<1.

def test_flags_are_those_of_the_recipes():
    "cli.json, from which the commands know them without PyTorch: run its notebook if this fails"
    assert json.loads(flags_file.read_text())==json.loads(json.dumps(ask_package()))
    assert set(ask_package()['settings'])==set(setting_info()) and set(ask_package()['recipes'])==set(recipes())

def parse(words):
    nm,*rest = shlex.split(words)
    return nm,parse_words(getattr(cli, nm).__wrapped__, rest)

def test_every_setting_has_a_flag_that_gives_it():
    "All settings of all recipes, written as flags, make the same recipe"
    for nm in recipes():
        r,words = get_recipe(nm),[]
        for k,v in r.settings.items():
            f = k.replace('_', '-')
            if isinstance(v, bool): words.append(f'--{f}' if v else f'--no-{f}')
            else: words += [f'--{f}', *(str(i) for o in (v if isinstance(v, tuple) else ['none' if v is None else v]) for i in (o if isinstance(o, (list,tuple)) else [o]))]
        _,args = parse(f'ssl_pretrain photos --recipe {nm} '+' '.join(words))
        given = {k:v for k,v in args.items() if k in r.settings}
        assert given==r.settings and {k:type(v) for k,v in given.items()}=={k:type(v) for k,v in r.settings.items()}
    assert parse('ssl_pretrain a --recipe b --stats .1 .2 .3 .4')[1]['stats']==([.1,.2],[.3,.4])
    assert parse('ssl_pretrain a --recipe b --stats none --size 28')[1] | dict(stats=None, size=28)==parse('ssl_pretrain a --recipe b --stats none --size 28')[1]
    assert 'stats' not in parse('ssl_pretrain a --recipe b')[1]

def test_commands_in_the_texts(project, capsys):
    "The batch file is valid bash, and the commands know the options that texts show"
    batch = project/'examples'/'pretrain.sbatch'
    assert subprocess.run(['bash', '-n', batch], capture_output=True).stderr==b''
    cells = [c for o in sorted((project/'nbs').glob('7?_cli*.ipynb')) for c in json.loads(o.read_text())['cells']]
    text  = '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')
    shown = re.findall(r'^ +(?:torchrun .*--no-python )?(ssl_\w+ .*)$', text, re.M) + ['ssl_pretrain '+o for o in re.findall(r'examples/pretrain\.sbatch (photos .*)', batch.read_text())]
    assert len(shown)>=5
    for nm,args in map(parse, shown): assert nm!='ssl_pretrain' or args['recipe'] in recipes()
    flags = {o for nm in ('ssl_pretrain','ssl_linear','ssl_semisup') for o in help_flags(nm, capsys)}
    table = [o for row in re.findall(r'^\| `--[^|]*\|([^|]*)\|', text, re.M) for o in re.findall(r'`(--[\w-]+)', row)]
    assert len(table)>30 and set(table)<=flags, set(table)-flags

def help_flags(nm, capsys):
    with pytest.raises(SystemExit): parse_words(getattr(cli, nm), ['--help'])
    return re.findall(r'(?<!\w)(--[\w.-]+)', capsys.readouterr().out)

def test_suggest(images, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['ssl_pretrain', 'photos', '--recipe', 'swav_200ep', '--suggest'])
    assert cli.ssl_pretrain(images/'all', 'swav_200ep', tmp_path/'out', n_in=1, suggest=True) is None
    shown = capsys.readouterr().out.splitlines()
    assert any(o.startswith('crop_sizes=') for o in shown) and not (tmp_path/'out').exists()
    nm,args = parse(shown[-1])
    new = get_recipe('swav_200ep').suggest(n_images, 28, n_in=1).settings
    assert {k:v for k,v in args.items() if k in new}=={k:pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k,v in new.items() if get_recipe('swav_200ep').settings.get(k, new)!=v}
