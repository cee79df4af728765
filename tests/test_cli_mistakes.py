"What the commands answer to what people type, and what is left on the disk"
import ast, csv, errno, json, os, re, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from self_supervised import __version__, cli, cli_command, cli_judge, cli_log, cli_pretrain
from self_supervised.checkpoint import Checkpoint, load_encoder
from self_supervised.cli_command import in_shell, _flags
from self_supervised.recipes import get_recipe

def few(folder, n=24, size=30):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 255, (size,size), dtype=np.uint8)).save(folder/f'{i:02}.png')
    return folder

@pytest.fixture(scope='module')
def images(tmp_path_factory): return few(tmp_path_factory.mktemp('im'))

tiny = '--recipe swav_small --n-in 1 --arch test_mambaout --no-low-resolution --hidden-size 16 --bs 8 --n-protos 5 --workers 0'.split()

@pytest.fixture
def say(monkeypatch, capsys):
    "Run a command in this process, without its pictures: exit code, what it prints, what it says of mistakes"
    for o in ('save_views','save_curves'): monkeypatch.setattr(cli_pretrain, o, lambda learn: None)
    def _say(*words, command=None):
        monkeypatch.setattr(sys, 'argv', [str(o) for o in words])
        try: code = (command or getattr(cli, words[0]))()
        except SystemExit as e: code = e.code
        out = capsys.readouterr()
        return (code, out.out, out.err) if not isinstance(code, str) else (1, out.out, out.err+code)
    return _say

def one_line(err): return mine(err).strip().count('\n')==0 and 'Traceback' not in err

def mine(err): return ''.join(o for o in err.splitlines(True) if 'the colour operations that need RGB' not in o and 'in proportion' not in o)

# ---- counts and folders

@pytest.mark.parametrize('flag,says', [('--workers -1','-1 must be 0 or more'), ('--bs 0','0 must be 1 or more'), ('--bs -8','-8 must be 1'), ('--epochs 0','must be 1 or more'), ('--hidden-size 0','must be 1'),
    ('--n-protos 0','must be 1'), ('--projection-size 0','must be 1'), ('--nlayers 0','must be 1'), ('--n-sinkh-iter 0','must be 1'), ('--load-size 0','must be 1'), ('--knn-every 0','must be 1'), ('--n-in 0','must be 1'),
    ('--timeout 0','must be 1'), ('--seed -1','must be 0'), ('--extend 0','must be 1'), ('--n-heads 0','must be 1'), ('--warmup-epochs 5 --epochs 5', '--warmup-epochs 5 must be fewer than --epochs 5')])
def test_counts(flag, says, images, tmp_path, say):
    code,out,err = say('ssl_pretrain', images, '--recipe', 'swav_small', *flag.split(), '--out', tmp_path/'run')
    assert code and says in err and flag.split()[0] in err and not out and not (tmp_path/'run').exists()

@pytest.mark.parametrize('words', ['ssl_knn X Y --k 0', 'ssl_knn X Y --bs 0', 'ssl_linear X Y --epochs 0', 'ssl_linear X Y --workers -1', 'ssl_semisup X Y --seeds 0', 'ssl_knn X Y --size 0', 'ssl_semisup X Y --n-per-class 0'])
def test_counts_of_questions(words, say):
    code,_,err = say(*words.split())
    assert code==2 and 'or more' in err

@pytest.mark.parametrize('out', ['/proc/run', '/dev/null/run', 'FILE/run', 'FILE/a/b'])
def test_folders_that_take_nothing(out, images, tmp_path, say):
    (tmp_path/'file').touch()
    code,said,err = say('ssl_pretrain', images, '--recipe', 'swav_small', '--out', out.replace('FILE', f'{tmp_path}/file'))
    assert code and '--out' in err and 'give another folder' in err and one_line(err) and not said
    assert list(tmp_path.iterdir())==[tmp_path/'file']

@pytest.mark.parametrize('no', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disks_that_take_nothing(no, images, tmp_path, say, monkeypatch):
    def fail(*args, **kwargs): raise OSError(no, os.strerror(no))
    monkeypatch.setattr(cli_command.tempfile, 'TemporaryFile', fail)
    code,_,err = say('ssl_pretrain', images, '--recipe', 'swav_small', '--out', tmp_path/'run')
    assert code and f'({os.strerror(no)})' in err and one_line(err)

def test_full_disk(images, tmp_path):
    "in the middle of a run: one line, and no half file"
    code = f"""
import resource, sys
from self_supervised import cli, checkpoint, recipes, online, monitor # what is imported may write caches
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.argv = {['ssl_pretrain', str(images), *tiny, '--epochs', '1', '--out', str(tmp_path/'run')]!r}
cli.ssl_pretrain()"""
    import processes
    r = processes.run('-c', code, cwd=tmp_path)
    assert r.returncode and r.stderr.strip().splitlines()[-1].startswith('ssl_pretrain: ') and 'Make room, and give the same command again' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not list((tmp_path/'run').rglob('*.part')) and not (tmp_path/'run'/'encoder.safetensors').exists()

@pytest.mark.parametrize('load', [10, 27])
def test_load_size_under_the_crop(load, images, tmp_path, say):
    code,out,err = say('ssl_pretrain', images, *tiny, '--load-size', load, '--out', tmp_path/'run')
    assert code and f'--load-size {load} is less than the views that are cut from it, 28×28: 64 is usual' in err and not (tmp_path/'run').exists()

def test_a_short_run_has_a_short_warm_up(images, tmp_path, say):
    code,out,err = say('ssl_pretrain', images, *tiny, '--epochs', 1, '--out', tmp_path/'run')
    said = json.loads((tmp_path/'run'/'settings.json').read_text())['settings']
    assert not code and '--epochs 1 instead of the' in err and '--warmup-epochs 1 → ' in err and 0<said['warmup_epochs']<1 and said['epochs']==1, err
    assert not say('ssl_pretrain', images, *tiny, '--epochs', 1, '--out', tmp_path/'run')[0] # and goes on

# ---- Ctrl-C, terminals, pipes

def test_ctrl_c_while_libraries_load(images, tmp_path, say, monkeypatch):
    def press(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli_pretrain, '_check_same', press) # just before
    code,out,err = say('ssl_pretrain', images, *tiny, '--out', tmp_path/'run')
    assert code==130 and err.strip()=='ssl_pretrain: stopped by Ctrl-C' and not out and not (tmp_path/'run').exists()

def test_ctrl_c_in_the_fit(images, tmp_path, say, monkeypatch):
    "One line says how to go on, and it is a command"
    before = Checkpoint.before_train
    def press(self):
        before(self)
        if self.epoch==1: os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'before_train', press)
        code,out,err = say('ssl_pretrain', images, *tiny, '--epochs', 3, '--out', tmp_path/'run')
    last = [o for o in out.splitlines() if 'top' in o or 'go on' in o or 'resume' in o]
    assert code==130 and len(last)==1 and re.match(r'Stopped by Ctrl-C. To go on, give the same command again: ssl_pretrain ', last[0]) and mine(err)==''
    assert 'where it ended' not in (again := say('ssl_pretrain', images, *tiny, '--epochs', 3, '--out', tmp_path/'run'))[1] and not again[0]

@pytest.mark.parametrize('kind', ['ascii', 'latin-1', 'utf-8'])
def test_terminals(kind, capfd, monkeypatch, tmp_path):
    "All signs that we use have a stand-in"
    import io
    text = 'views 28×28 → 3 ± 1 … τ λ √2 ≥ Größe \udcff'
    out = io.TextIOWrapper(io.BytesIO(), encoding=kind, errors='strict')
    monkeypatch.setattr(sys, 'stdout', out)
    @cli_command.command
    def hello(n:int=1): print(text)
    monkeypatch.setattr(sys, 'argv', ['hello'])
    hello()
    out.flush()
    said = out.buffer.getvalue().decode(kind)
    assert said.startswith({'ascii':'views 28x28 -> 3 +- 1 ... tau lambda sqrt2 >= Gr??e ?', 'latin-1':'views 28×28 -> 3 ± 1 ... tau lambda sqrt2 >= Größe ?', 'utf-8':text[:-1]+'?'}[kind])

def test_signs_are_known():
    "Every sign that a message of this package may show has one in ASCII"
    src = ''.join(p.read_text() for p in Path(cli_command.__file__).parent.glob('cli*.py'))
    shown = {c for n in ast.walk(ast.parse(src.replace('from __future__', '#'))) if isinstance(n, ast.Constant) and isinstance(n.value, str) for c in n.value if ord(c)>127}
    assert shown <= set(cli_command._signs)

def test_nobody_reads_on(tmp_path):
    (tmp_path/'many.py').write_text("""import sys
from self_supervised.cli_command import command
@command
def many(n:int=1):
    for i in range(99999): print(i)
sys.argv = ['many']
many()""")
    r = subprocess.run(f'{sys.executable} {tmp_path}/many.py | head -1', shell=True, capture_output=True, text=True)
    assert r.stdout=='0\n' and not r.stderr

def test_wandb_without_login(images, tmp_path, say, monkeypatch):
    pytest.importorskip('wandb')
    for k in ('WANDB_API_KEY','WANDB_MODE'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path/'none'))
    code,_,err = say('ssl_pretrain', images, *tiny, '--wandb', 'x', '--out', tmp_path/'run')
    assert code and 'wandb login' in err and 'WANDB_API_KEY' in err and not (tmp_path/'run').exists()

# ---- words

@pytest.mark.parametrize('command,flag,says', [
    ('ssl_pretrain','--batch-size','here it is --bs'), ('ssl_pretrain','--batch_size','here it is --bs'), ('ssl_pretrain','--learning-rate','here it is --lr'), ('ssl_pretrain','--output-dir','here it is --out'),
    ('ssl_pretrain','--num-workers','here it is --workers'), ('ssl_pretrain','-j','here it is --workers'), ('ssl_pretrain','--device','CUDA_VISIBLE_DEVICES'), ('ssl_pretrain','--gpus','torchrun'), ('ssl_pretrain','--data-path','come first'),
    ('ssl_pretrain','--image-size','here it is --load-size'), ('ssl_pretrain','--fp16','here it is --precision'), ('ssl_pretrain','--pretrained','here it is --init'), ('ssl_pretrain','--num-epochs','here it is --epochs'),
    ('ssl_linear','--batch-size','here it is --bs'), ('ssl_linear','--learning-rate=1','here it is --lr'), ('ssl_knn','--image-size','here it is --size'), ('ssl_export','--output','here it is --out'), ('ssl_knn','--learning-rate','is unknown: there are')])
def test_flags_that_people_type(command, flag, says, say):
    code,out,err = say(command, 'a', *([] if command=='ssl_export' else ['b']), *('--recipe swav_small' if command=='ssl_pretrain' else '').split(), *(['--out','x'] if command=='ssl_export' else []), flag, *([] if '=' in flag else ['1']))
    assert code==2 and says in err

@pytest.mark.parametrize('command', cli.__all__)
def test_version_and_usage(command, say):
    assert say(command, '--version')==(0, f'self_supervised {__version__}\n', '')
    usage = say(command, *(['--nothing'] if command=='ssl_explore' else []))[2].splitlines()[0] # which would begin without a word
    assert usage.startswith(f'usage: {command} ') and ('--recipe RECIPE' in usage)==(command=='ssl_pretrain') and ('--out OUT' in usage)==(command in ('ssl_export','ssl_shards'))

def test_hints_exist():
    "A hint names a flag of some command"
    every = {o for f in cli.__all__ for o in _flags(getattr(cli, f)).values()}
    assert {f'--{k}' for k in cli_command._typed} <= every

# ---- remedies are flags

_modules = 'image_files data recipes core monitor online queue heads transforms pipelines optimizer suggest vision/swav vision/simclr vision/deepcluster vision/sela'.split()
_elsewhere = ('source', 'valid', 'groups', 'vocab', 'full=True', 'no loss of its own', 'does not take', 'must both have', 'is not registered', 'this Learner', 'the model is a', 'such settings', 'metrics', 'get_preds', # nothing of these can be said on the command line
              'p=', 'kernel_size', 'older package', 'n_views', 'distrib_ctx', 'memory=', 'patience', 'aug_pipelines', 'two methods on one', 'batch norms of the encoder are frozen', 'no DataLoaders', 'n_images=', 'every=', 'a batch has', 'ps=', 'warmup={', 'has no convolution', 'lin_ftrs', 'z has shape', 'k={', 'length=', 'scale=', 'ratio=', 'steps', 'checkpoint', 'threshold=', 'image_size=')

def messages():
    "Every message of an error or a warning, with 3 for what stands in it"
    for nm in _modules:
        for node in ast.walk(ast.parse((Path(cli_command.__file__).parent/f'{nm}.py').read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('ValueError','TypeError','ImportError','ImageFileError','warn_once') and node.args:
                text = ''.join(o.value if isinstance(o, ast.Constant) and isinstance(o.value, str) else '3' if isinstance(o, ast.FormattedValue) else '' for o in _parts(node.args[0]))
                yield nm,text

def _parts(o):
    if isinstance(o, ast.JoinedStr): return o.values
    if isinstance(o, ast.BinOp): return [*_parts(o.left), *_parts(o.right)]
    return [o]

def test_remedies_are_flags():
    "What the library says of what a command may meet names no Python"
    flags,bad = _flags(cli.ssl_pretrain),[]
    for nm,text in messages():
        if any(o in text for o in _elsewhere): continue
        said = in_shell(text, flags)
        if m := re.search(r"(?<![-\w])[a-z_]+=|skip_bad|image_dls|tensor_dls|list of files|\blearn\.|=True|\bor None\b|\b(pass|give) [a-z]+_[a-z]+\b", said): bad.append((nm, m[0], said))
    assert not bad, '\n'.join(map(str, bad))

def test_names_in_paths_stay():
    flags = _flags(cli.ssl_pretrain)
    for o in ('data/n_in=3/x.png', 'run/n_protos.txt', 'x.n_in=3', '--override n_in load_size (or give this run another --out)'): assert in_shell(o, flags)==o

def damage(im):
    (im/'bad.png').write_bytes((im/'00.png').read_bytes()[:100])
    return im

@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image(workers, tmp_path, say):
    "is one line, also from a process that decodes, and its remedy works"
    im,run = damage(few(tmp_path/'im')),tmp_path/'run'
    words = 'ssl_pretrain', im, *tiny, '--epochs', 1, '--out', run
    code,out,err = say(*words, '--workers', workers)
    assert code and 'bad.png' in err and '--skip-bad' in err and 'skip_bad' not in err and one_line(err), err
    if workers: return
    code,out,err = say(*words, '--skip-bad')
    assert not code and 'bad.png' in err and 'skipped 1 of 25' in err and one_line(err), err
    assert (run/'images.txt').read_text().split()==[f'{i:02}.png' for i in range(24)] and json.loads((run/'settings.json').read_text())['data']['skipped']==['bad.png']
    for more in ((), ('--skip-bad',)): # it goes on, and says nothing of new images
        code,out,err = say(*words, *more)
        assert not code and 'have come' not in out and 'bad.png' not in err, out+err

def test_skip_bad_in_a_run_that_has_begun(tmp_path, say):
    im,run = few(tmp_path/'im'),tmp_path/'run'
    words = 'ssl_pretrain', im, *tiny, '--epochs', 1, '--out', run
    assert not say(*words)[0]
    damage(im)
    code,_,err = say(*words, '--skip-bad')
    assert code and '--override data' in err
    code,_,err = say(*words, '--skip-bad', '--override', 'data')
    assert not code and 'bad.png' in err

def test_a_warning_is_one_line(say):
    import warnings
    def warned(n:int=1):
        "Warn"
        warnings.warn('take n=3')
    code,out,err = say('warned', command=cli_command.command(warned))
    assert err=='warned: take --n 3\n' and not code

def test_errors_of_others_keep_their_traceback(monkeypatch):
    def wrong(n:int=1): raise ValueError('x')
    def odd(n:int=1): raise RuntimeError('x')
    for f in (wrong, odd):
        monkeypatch.setattr(sys, 'argv', ['f'])
        with pytest.raises((ValueError,RuntimeError)): cli_command.command(f)()

# ---- sources

def test_sources(tmp_path, say, monkeypatch):
    "Folders, files and lists"
    a,b = few(tmp_path/'a', 8),few(tmp_path/'b', 8)
    (tmp_path/'list.txt').write_text(''.join(f'b/{i:02}.png\n' for i in range(8)))
    for i,sources in enumerate(([a, b], [a, *b.glob('*.png')], [a, tmp_path/'list.txt'])):
        run = tmp_path/f'run{i}'
        assert not (res := say('ssl_pretrain', *sources, *tiny, '--epochs', 1, '--out', run))[0], res
        names = (run/'images.txt').read_text().split('\n')[:-1]
        assert sorted(names)==sorted(str(o) for d in (a,b) for o in d.glob('*.png')), names
    assert not (res := say('ssl_pretrain', *sources, *tiny, '--epochs', 1, '--out', run))[0] and 'where it ended' in res[1], res

@pytest.mark.parametrize('text,says', [('', 'is empty'), ('a/00.png\n\nno.png\n', 'line 3: no.png is no file'), ('a\n', 'line 1: a is no file'), ('\0\0', 'no image, no folder and no text')])
def test_lists_that_are_none(text, says, tmp_path, say):
    few(tmp_path/'a', 1)
    (tmp_path/'list').write_text(text)
    code,_,err = say('ssl_pretrain', tmp_path/'list', '--recipe', 'swav_small', '--out', tmp_path/'run')
    assert code and says in err and one_line(err)

def test_drawings_are_no_images(tmp_path, say):
    (tmp_path/'logo.svg').write_text('<svg/>')
    assert 'no image in the folder' in say('ssl_pretrain', tmp_path, '--recipe', 'swav_small')[2]

# ---- more of a run

def test_extend(images, tmp_path, say, monkeypatch):
    "A finished run goes on, once for each time it has ended"
    run,words = tmp_path/'run',('ssl_pretrain', images, *tiny)
    epochs = lambda: [int(o['epoch']) for o in csv.DictReader((run/'history.csv').open())]
    assert 'there is no run' in say(*words, '--extend', 2, '--out', run)[2]
    assert not say(*words, '--epochs', 2, '--out', run)[0] and epochs()==[0,1]
    rates = []
    with monkeypatch.context() as m: # killed in its first epoch
        def die(self):
            rates.append(self.opt.hypers[-1]['lr'])
            raise KeyboardInterrupt
        m.setattr(Checkpoint, 'after_batch', die)
        assert say(*words, '--extend', 2, '--epochs', 2, '--out', run)[0]==130
    r = get_recipe('swav_small', bs=8, epochs=4) # one epoch of warm-up
    assert rates==[pytest.approx(r.lr_final+(r.lr-r.lr_final)*(1+np.cos(np.pi*(.5-.25)/.75))/2, rel=1e-5)] # half of the longer run's
    code,out,err = say(*words, '--extend', 2, '--epochs', 2, '--out', run)
    assert not code and epochs()==[0,1,2,3], out+err
    assert 'leave --epochs out' in say(*words, '--extend', 1, '--epochs', 7, '--out', run)[2]
    assert not (res := say(*words, '--extend', 1, '--out', run))[0] and epochs()==[0,1,2,3,4], res

def test_init(images, tmp_path, say, monkeypatch):
    "The weights of a file, and of a run; another architecture, none and no network are answered"
    words = ('ssl_pretrain', images, *tiny, '--epochs', 1, '--lr', 1e-12, '--lr-start', 1e-12, '--lr-final', 1e-12, '--wd', 0)
    assert not say('ssl_pretrain', images, *tiny, '--epochs', 1, '--out', tmp_path/'a')[0]
    for i,init in enumerate((tmp_path/'a', tmp_path/'a'/'encoder.safetensors', *(tmp_path/'a'/'checkpoints').glob('*.ckpt'))):
        assert not (res := say(*words, '--init', init, '--out', tmp_path/f'b{i}'))[0], res
        a,b = (dict(load_encoder(tmp_path/o/'encoder.safetensors').named_parameters()) for o in ('a', f'b{i}'))
        assert all(torch.allclose(a[k], b[k], atol=1e-8) for k in a)
    for init,says in (('swav_80ep','did you mean swav_800ep'), ('random:resnet18','leave it out'), ('imagenet','has no weights for test_mambaout; give --init none')):
        code,_,err = say(*words, '--init', init, '--out', tmp_path/'c')
        assert code and says in err and one_line(err) and not (tmp_path/'c'/'checkpoints').exists(), err
    code,_,err = say(*words, '--init', tmp_path/'a', '--arch', 'resnet18', '--out', tmp_path/'c')
    assert code and 'does not fit' in err and one_line(err)
    from urllib.error import URLError
    def offline(*args, **kwargs): raise URLError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'hub'))
    code,_,err = say(*words, '--n-in', 3, '--init', 'imagenet', '--arch', 'resnet18', '--out', tmp_path/'c')
    assert code and 'could not be fetched' in err and '--init none' in err, err
    assert not say(*words, '--init', 'none', '--out', tmp_path/'d')[0]

# ---- the log

def test_log_is_for_awk(images, tmp_path, say):
    code,out,err = say('ssl_pretrain', images, *tiny, '--epochs', 3, '--out', tmp_path/'run')
    first,head,*rows = out.splitlines()
    assert first==f'Training on 24 whole images, with a shorter side of 64 pixels at most, in batches of 8, 3 steps an epoch, 3 epochs, on cpu, into {tmp_path}/run'
    rows,table = [o.split() for o in rows[:3]],list(csv.DictReader((tmp_path/'run'/'history.csv').open()))
    assert head.split()[:2]==['epoch','train_loss'] and 'valid_loss' not in head and head.split()[-1]=='time' and all(len(o)==len(head.split()) for o in rows)
    for row,want in zip(rows, table):
        for k,v in zip(head.split()[:-1], row): assert float(v)==pytest.approx(float(want[k]), abs=1e-6)
    assert '█' not in out and 'None' not in out and out.count('train_loss')==1

def test_lines_within_an_epoch(images, tmp_path, say, monkeypatch):
    now = iter(range(0, 10**6, 25)) # a step takes 25 seconds
    class Clock:
        def __getattr__(self, k): return getattr(__import__('time'), k)
        def monotonic(self): return next(now)
    monkeypatch.setattr(cli_log, 'time', Clock())
    out = say('ssl_pretrain', images, *tiny, '--bs', 2, '--epochs', 2, '--out', tmp_path/'run')[1]
    steps = re.findall(r'^step (\d+)/24, epoch (\d): loss ([\d.]+), lr ([\d.e-]+), ([\d.]+) images/s, (\S+) left$', out, re.M)
    assert [int(o[0]) for o in steps]==[4, 7, 10, 16, 19, 22] and {o[4] for o in steps}=={'0.08'} # one in 75 seconds, from the first step of an epoch on
    assert steps[0][5]=='0:08:20' and steps[-1][5]=='0:00:50'

def test_results_are_rounded(images, tmp_path, say):
    for c in 'ab':
        for h in ('train','val'): few(tmp_path/h/c, 4)
    code,out,err = say('ssl_knn', 'random:test_mambaout', tmp_path, '--k', 2, '--size', 30, '--stats', .48500001430511475, .4560000002384186, .4059999883174896, .229, .224, .225, '--results', tmp_path/'r.jsonl')
    assert not code and not re.search(r'\d\.\d{5}', out), out+err

# ---- encoders

def test_paths_of_encoders(images, tmp_path, say, monkeypatch):
    "A run, a checkpoint, a name that lies, ~: what is in them counts"
    run = tmp_path/'run'
    assert not say('ssl_pretrain', images, *tiny, '--epochs', 1, '--out', run)[0]
    want = load_encoder(run/'encoder.safetensors').state_dict()
    (tmp_path/'lies.pth').write_bytes((run/'encoder.safetensors').read_bytes())
    monkeypatch.setenv('HOME', str(tmp_path))
    ckpt = next((run/'checkpoints').glob('*.ckpt'))
    for o in (run, run/'encoder.safetensors', '~/run', '~/lies.pth', ckpt):
        encoder,size,_ = cli_judge.open_encoder(str(o))
        assert size==[28,28] and all(torch.equal(v, encoder.state_dict()[k].cpu()) for k,v in want.items())
    assert cli_judge.find_encoder(str(ckpt))[1]==run # where answers go

@pytest.mark.parametrize('make,says', [
    (lambda f: f.write_bytes(b''), 'empty'), (lambda f: f.write_text('<html>'), 'web page'), (lambda f: torch.save(torch.nn.Linear(2, 2), f), 'Python objects'),
    (lambda f: torch.save(dict(model=dict(a=torch.zeros(1)), opt={}), f), 'a model and its optimizer'), (lambda f: torch.save(dict(a=torch.zeros(1)), f), 'does not fit')], ids=lambda o: o if isinstance(o, str) else '')
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.pkl', '.ckpt'])
def test_files_that_are_no_encoders(make, says, suffix, tmp_path, say):
    f = tmp_path/f'x{suffix}'
    make(f)
    code,_,err = say('ssl_export', f, '--out', tmp_path/'y', '--layout', 'timm')
    assert code and says in err and str(f) in err and 'Traceback' not in err, err
    assert not (tmp_path/'y').exists()

def test_export_leaves_no_half_file(images, tmp_path, say, monkeypatch):
    assert not say('ssl_pretrain', images, *tiny, '--epochs', 1, '--out', tmp_path/'run')[0]
    def full(a, b):
        Path(b).write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(b))
    monkeypatch.setattr(cli_judge.shutil, 'copyfile', full)
    code,_,err = say('ssl_export', tmp_path/'run', '--out', tmp_path/'e')
    assert code and 'No space left' in err and one_line(err) and [o.name for o in tmp_path.iterdir()]==['run']

def test_export_to_onnx(images, tmp_path, say):
    "or the extra that it needs"
    from importlib.util import find_spec
    code,_,err = say('ssl_export', 'random:test_mambaout', '--layout', 'onnx', '--out', tmp_path/'e.onnx')
    assert code and 'no run of yours' in err
    assert not say('ssl_pretrain', images, *tiny, '--epochs', 1, '--out', tmp_path/'run')[0]
    code,out,err = say('ssl_export', tmp_path/'run', '--layout', 'onnx', '--out', tmp_path/'e.onnx')
    if find_spec('onnx') and find_spec('onnxscript'): assert not code and (tmp_path/'e.onnx').exists(), err
    else: assert code and "pip install 'self_supervised[onnx]'" in err and one_line(err) and not (tmp_path/'e.onnx').exists()

# ---- python -m self_supervised

@pytest.mark.parametrize('words', [['ssl_pretrain'], ['pretrain']])
def test_module(words, images, tmp_path, monkeypatch, capsys):
    from self_supervised.__main__ import main
    with pytest.raises(SystemExit) as e: main([*words, str(images), '--recipe', 'swav_smal'])
    assert 'did you mean swav_small' in e.value.code
    with pytest.raises(SystemExit) as e: main(['pretain'])
    assert e.value.code=='python -m self_supervised: pretain is no command: did you mean pretrain?'
    for o in ([], ['--help']):
        main(o)
        out = capsys.readouterr().out
        assert all(f'\n  {k.removeprefix("ssl_")} ' in out for k in [*cli.__all__, 'ssl_explore'])
    main(['--version'])
    assert capsys.readouterr().out==f'self_supervised {__version__}\n'

def test_pictures_of_runs_are_no_images(tmp_path, say):
    "of this run, and of others that lie among the images"
    im = few(tmp_path/'im')
    for o in ('a', 'b'):
        assert not say('ssl_pretrain', im, *tiny, '--epochs', 1, '--out', im/o)[0]
        assert (im/o/'images.txt').read_text().split()==[f'{i:02}.png' for i in range(24)]
        Image.new('L', (30,30)).save(im/o/'views.png')
    code,_,err = say('ssl_pretrain', im/'a', *tiny, '--epochs', 1, '--out', im/'c')
    assert code and 'but those of runs of this command' in err
