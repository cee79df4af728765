"Any iterable of batches trains: its batches in its order, schedules as of an ordinary loader, and a killed run ends as one that was not"
import itertools, warnings

import pytest, torch
import torch.utils.data as td
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find and fit_one_cycle into Learner)
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn

from self_supervised.basics import loader_facts
from self_supervised.data import tensor_dls
from self_supervised.diagnostics import CollapseMonitor
from self_supervised.dist import rank
from self_supervised.features import extract_features
from self_supervised.recipes import get_recipe
from self_supervised.run_settings import run_settings
from self_supervised.loaders import StreamDL, loader_dls

import methods, test_checkpoint
from methods import images, learner, quiet
from processes import on_ranks
from test_batches import Brightness, Mean, toy
from test_checkpoint import Die, outcome, same

x,y = images(40),torch.arange(40)%4 # five batches of 8

@pytest.fixture(autouse=True)
def workers_go_home(monkeypatch):
    "What is left to Python's collector of cycles lets its workers wait for ten seconds"
    made,init = [],StreamDL.__init__
    monkeypatch.setattr(StreamDL, '__init__', lambda self, *args, **kwargs: (made.append(self), init(self, *args, **kwargs))[1])
    yield
    for o in made: vars(o).pop('_it', None)

# ---- loaders of every kind; `n` images in order, without end if `n` is None

class Stream(td.IterableDataset):
    def __init__(self, n=40): self.n = n
    def __iter__(self):
        for i in itertools.count() if self.n is None else range(self.n): yield x[i%40],y[i%40]

class Stateful:
    "What `StatefulDataLoader` and `StreamingDataLoader` offer, with an order of its own in each pass"
    def __init__(self, n=40, bs=8, drop_last=True): self.n,self.batch_size,self.drop_last,self.i,self.gen,self.read = n,bs,drop_last,0,torch.Generator().manual_seed(0),0
    def state_dict(self): return dict(i=self.i, gen=self.begin if self.i else self.gen.get_state())
    def load_state_dict(self, s): self.i,self.begin = s['i'],s['gen']; self.gen.set_state(s['gen'])
    def __len__(self): return self.n//self.batch_size
    def __iter__(self):
        self.begin = self.gen.get_state()
        order = torch.randperm(self.n, generator=self.gen)
        while self.i<len(self):
            o,self.i,self.read = order[self.i*self.batch_size:(self.i+1)*self.batch_size],self.i+1,self.read+1
            yield x[o%40],y[o%40]
        self.i = 0

class Draws(Stateful):
    "One that draws its order from the random numbers of the process, when it starts"
    def state_dict(self): return dict(i=self.i)
    def load_state_dict(self, s): self.i = s['i']
    def __iter__(self): return self.rest(torch.randperm(self.n))
    def rest(self, order):
        for self.i in range(self.i+1, len(self)+1): o = order[(self.i-1)*8:self.i*8]; yield x[o%40],y[o%40]
        self.i = 0

class Late(td.DataLoader):
    "One of PyTorch that starts, and draws the seed of its workers, with its first batch, as that of litdata"
    i = 0
    def state_dict(self): return dict(i=self.i)
    def load_state_dict(self, s): self.i = s['i']
    def __iter__(self):
        done = self.i
        for j,b in enumerate(super().__iter__(), 1):
            if j>done: self.i = j; yield b
        self.i = 0

def function(n=40, bs=8, shuffle=False):
    def batches():
        order = torch.randperm(n) if shuffle else torch.arange(n)
        for o in order.split(bs): yield x[o%40],y[o%40]
    return batches

def torchdata_dl(ds, **kwargs):
    return pytest.importorskip('torchdata.stateful_dataloader').StatefulDataLoader(ds, 8, **kwargs)

def hf(shuffle=False):
    ds = pytest.importorskip('datasets').Dataset.from_dict(dict(image=x.tolist(), label=y.tolist())).to_iterable_dataset()
    return (ds.shuffle(seed=0, buffer_size=10) if shuffle else ds).with_format('torch')

def hf_bytes(b): return dict(image=torch.stack([o['image'].to(torch.uint8) for o in b]), label=torch.tensor([int(o['label']) for o in b]))

def litdata_dl(folder, **kwargs):
    lit = pytest.importorskip('litdata')
    if not (folder/'index.json').exists():
        from litdata.streaming.writer import BinaryWriter
        w = BinaryWriter(str(folder), chunk_size=10)
        for i,o in enumerate(zip(x, y)): w[i] = o
        w.done(); w.merge()
    return lit.StreamingDataLoader(lit.StreamingDataset(str(folder), **kwargs), batch_size=8)

kinds = { # name → loader of 40 images, in order
    'list': lambda p: list(function()()), 'function': lambda p: function(), 'generator': lambda p: function(120)(), 'DataLoader': lambda p: td.DataLoader(list(zip(x,y)), 8),
    'stream': lambda p: td.DataLoader(Stream(), 8), 'endless': lambda p: td.DataLoader(Stream(None), 8), 'workers': lambda p: td.DataLoader(Stream(), 8, num_workers=1), 'batches': lambda p: td.DataLoader(list(function()()), None),
    'fastai': lambda p: tensor_dls((x,y), bs=8, shuffle=False, device='cpu').train, 'torchdata': lambda p: torchdata_dl(Stream()), 'torchdata workers': lambda p: torchdata_dl(list(zip(x,y)), num_workers=1),
    'hf': lambda p: td.DataLoader(hf(), 8, collate_fn=hf_bytes), 'litdata': lambda p: litdata_dl(p)}

class Seen(Callback):
    "Labels, images and learning rates of all training steps"
    order = 90
    def before_fit(self): self.y,self.x,self.lrs = [],[],[]
    def after_loss(self):
        if self.training: self.y.append(self.yb[0].clone()); self.lrs.append(self.opt.hypers[-1]['lr'])
    def before_batch(self):
        if self.training: self.x.append(self.xb[0][0].clone())

@pytest.mark.parametrize('kind', kinds)
def test_batches_come_in_their_order(kind, tmp_path):
    "Two epochs of seven steps, of a loader of five batches: 5+2, then 3+4"
    dls = loader_dls(kinds[kind](tmp_path), steps=7, device='cpu')
    quiet(learner('simclr', dls, cbs=(seen:=Seen())), 2)
    assert torch.equal(torch.cat(seen.y), y.repeat(3)[:14*8]) and len(dls.train)==7 and loader_facts(dls.train)=={**loader_facts(dls.train), 'n':56, 'bs':8}
    quiet(toy(dls := loader_dls(kinds[kind](tmp_path), steps=7, device='cpu'), [seen]), 2)
    want = x.repeat(3,1,1,1)[:14*8]
    assert torch.equal(torch.cat([(o*255).round().to(torch.uint8) if o.is_floating_point() else o for o in seen.x]), want) # fastai's loader gives bytes or floats

def test_normalised_images_of_a_fastai_loader():
    "They are undone, in the middle of a pass too"
    dl = tensor_dls((x,y), bs=8, shuffle=False, batch_tfms=Normalize.from_stats([.5], [.2], cuda=False), device='cpu').train
    quiet(toy(loader_dls(dl, steps=7, device='cpu'), [seen:=Seen()]), 2)
    assert torch.allclose(torch.cat(seen.x), x.repeat(3,1,1,1)[:14*8]/255, atol=1e-5)

def test_without_a_length():
    for dl in (function(), function()(), td.DataLoader(Stream(), 8)):
        with pytest.raises(ValueError, match='train has no length, and schedules, progress bar .* pass steps=…'): loader_dls(dl)
        with pytest.raises(ValueError, match=r'dls.train is a stream without a length.*loader_dls\(train, valid, steps=…\)'): quiet(toy(DataLoaders(dl, [])), 1)
    with pytest.raises(ValueError, match='valid has no length.*pass valid_steps=…'): loader_dls([x], td.DataLoader(Stream(), 8))

@pytest.mark.parametrize('dl,says', [(x, 'train is a Tensor'), (Stream(), 'train is a Stream'), (3, 'train is a int'), (tensor_dls(x, bs=8), 'train is a DataLoaders')], ids='tensor dataset number dls'.split())
def test_what_gives_no_batches(dl, says):
    with pytest.raises(TypeError, match=f'{says}, and batches are wanted: give a loader'): loader_dls(dl, steps=5)
    with pytest.raises(TypeError, match=f'{says.replace("train","valid")}, and batches are wanted'): loader_dls([x], dl, valid_steps=5)

@pytest.mark.parametrize('steps', [0, -1, 2.5, True])
def test_steps_are_a_number(steps):
    with pytest.raises(ValueError, match='steps=.* must be a whole number of batches'): loader_dls([x], steps=steps)

def test_a_generator_that_is_too_short():
    learn = learner('simclr', loader_dls(function()(), steps=4, device='cpu'))
    with pytest.raises(ValueError, match=r'generator of batches to train on has ended after 5 of them.*pass a function that makes a new one.*steps=4'): quiet(learn, 2)

def test_an_ordinary_loader_trains_the_same():
    "One with a length gives the same run, bit for bit, wrapped or not: order, schedule, weights"
    def run(wrap, find):
        set_seed(0)
        dl = td.DataLoader(list(zip(x,y)), 8, shuffle=True)
        learn = learner('simclr', loader_dls(dl, device='cpu') if wrap else DataLoaders(dl, []), cbs=(seen:=Seen()), loss_func=nn.Identity())
        with learn.no_bar(), learn.no_logging():
            if find: learn.lr_find(num_it=7, show_plot=False)
            learn.fit_one_cycle(3, 1e-2)
        return seen,outcome(learn)
    (a,one),(b,two),(_,three) = run(False, False),run(True, False),run(True, True)
    assert torch.equal(torch.cat(a.y), torch.cat(b.y)) and same(one, two) and same(one['weights'], three['weights']) and len(set(a.lrs))==15

@pytest.mark.parametrize('fit', [lambda l: l.fit_one_cycle(3, 1e-2), lambda l: l.fit_flat_cos(3, 1e-2), lambda l: l.fit_sgdr(2, 1, 1e-2)], ids='one_cycle flat_cos sgdr'.split())
def test_schedules(fit):
    def rates(dls):
        learn = learner('simclr', dls, cbs=(seen:=Seen()))
        with learn.no_bar(), learn.no_logging(): fit(learn)
        return seen.lrs
    want = rates(tensor_dls((x,y), bs=8))
    assert rates(loader_dls(td.DataLoader(Stream(None), 8), steps=5, device='cpu'))==want and len(set(want))>3

def test_the_bar_counts_steps():
    totals = []
    class Spy(ProgressCallback):
        def before_train(self): super().before_train(); totals.append(self.pbar.total)
    learn = learner('simclr', loader_dls(function(), steps=7, device='cpu'), cbs=[Spy()])
    with learn.no_logging(): learn.remove_cb(next(o for o in learn.cbs if type(o) is ProgressCallback)); learn.fit(2)
    assert totals==[7,7]

def test_steps_of_the_optimizer():
    "Sizes of batches that no loader says are found, for accumulated gradients and schedules of the method"
    learn = learner('byol', loader_dls(function(), steps=6, device='cpu'), cbs=GradientAccumulation(24))
    quiet(learn, 2)
    assert learn.byol.n_steps==4==learn.byol.steps_done

def test_monitor():
    learn = learner('simclr', loader_dls(function(), steps=7, device='cpu'), cbs=CollapseMonitor(every=3, warmup=0))
    quiet(learn, 2)
    assert learn.collapse_monitor.gap==3 and [o for o in learn.collapse_monitor.history['step']]==[3,6,9,12]

def test_recipe():
    "The first batch says how many channels; none is lost"
    def recipe(): return get_recipe('simclr_small', epochs=2, bs=8, warmup_epochs=1, size=12, **methods.plain)
    ones = function(80)()
    dls  = loader_dls(ones, steps=5, device='cpu')
    r    = recipe()
    learn = r.learner(dls, methods.encoder(1), cbs=(seen:=Seen()))
    with learn.no_bar(), learn.no_logging(): r.fit(learn)
    assert torch.equal(torch.cat(seen.y), y.repeat(2))
    want = r.learner(tensor_dls((x,y), bs=8), methods.encoder(1), cbs=(old:=Seen()))
    with want.no_bar(), want.no_logging(): r.fit(want)
    assert seen.lrs==old.lrs and len(set(old.lrs))>5
    with pytest.raises(ValueError, match='does not say how many images a batch has.*loader_dls'): r.fit(r.learner(DataLoaders(list(function()()), []), methods.encoder(1)))

def test_a_look_costs_nothing():
    dls = loader_dls(function(80)(), steps=5, device='cpu')
    get_recipe('simclr_small', size=12).learner(dls) # looks at the channels
    assert dls.train.taken==1 and loader_facts(dls.train).bs==8
    assert torch.equal(torch.cat([b[1] for b in dls.train]), y)

def test_an_epoch_that_is_held_on_to():
    "The exception of a broken epoch keeps its loop alive; what it gave is not given back into the next one"
    dl = StreamDL(function(), 5)
    old = iter(dl); next(old)
    rest = iter(dl); next(rest)
    old.close()
    assert torch.equal(next(rest)[0], x[16:24])

@pytest.mark.parametrize('valid,steps', [(list(function(20)()), None), (function(20), 9), (function(), 2), (td.DataLoader(Stream(20), 8), 9), (tensor_dls((x[:20],y[:20]), bs=8, drop_last=False, shuffle=False).train, None)],
                         ids='list function longer stream fastai'.split())
def test_validation(valid, steps):
    "From its beginning after each epoch, to its end or so many batches"
    losses = []
    class Hear(Callback):
        def after_loss(self):
            if not self.training: losses.append(self.loss.item())
    dls = loader_dls(function(), valid, steps=3, valid_steps=steps, device='cpu')
    learn = Learner(dls, Mean(), opt_func=SGD, cbs=[*toy(dls).cbs.filter(lambda o: isinstance(o, Brightness)), Hear()]); quiet(learn, 2, lr=0.)
    want = [o.float().mean().item()/255 for o in (x[:16] if steps==2 else x[:20]).split(8)]*2
    assert [round(o, 4) for o in losses]==[round(o if losses[0]<1 else o*255, 4) for o in want] and len(learn.recorder.values[0])==2
    with pytest.raises(TypeError, match='valid is a generator, which gives its batches once'): loader_dls([x], function()(), valid_steps=2)

def test_features_are_in_order():
    dls = loader_dls(td.DataLoader(list(zip(x,y)), 8, shuffle=True), td.DataLoader(list(zip(x,y)), 8, shuffle=True), device='cpu')
    for dl in dls: assert torch.equal(extract_features(Mean(), dl)[1], y)

@pytest.mark.parametrize('form', ['tuple','dict','images'])
def test_forms_of_batches(form):
    def batches():
        for a,b in function()(): yield dict(tuple=(a,b), dict=dict(image=a, label=b, path=['o.jpg']*8), images=a)[form]
    name = 'simclr' if form=='images' else 'supcon'
    quiet(learn := learner(name, loader_dls(batches, steps=7, device='cpu')), 2)
    assert len(learn.recorder.losses)==14

@pytest.mark.parametrize('name', ['deepcluster','sela'])
def test_methods_that_number_images(name):
    learn = learner(name, loader_dls(function(), steps=5, device='cpu'))
    with pytest.raises(TypeError, match='dls.train is a self_supervised.loaders.StreamDL.*needs their numbers: give a dataset with a length and an index to fastai.data.load.DataLoader .*method that remembers no images'): quiet(learn, 1)

def test_device():
    "Batches go where they are told"
    dls = loader_dls(lambda: iter([dict(image=x, name='a')]), steps=1, device='meta')
    assert next(iter(dls.train))['image'].is_meta and torch.device(dls.device)==torch.device('meta')
    assert next(iter(dls.to('cpu').train))['image'].is_cpu

# ---- a killed run

def shuffled(): return function(48, shuffle=True) # six batches

stateful = { # name → loader with a state, of six batches or five
    'imitation': lambda p: Stateful(48), 'draws': lambda p: Draws(56), 'late': lambda p: Late(list(zip(x,y)), 8), 'torchdata': lambda p: torchdata_dl(list(zip(x,y)), shuffle=True), 'torchdata workers': lambda p: torchdata_dl(list(zip(x,y)), shuffle=True, num_workers=2),
    'torchdata stream': lambda p: torchdata_dl(Stream()), 'torchdata hf': lambda p: torchdata_dl(hf(), collate_fn=hf_bytes), 'litdata': lambda p: litdata_dl(p, shuffle=True, seed=3)}
counted = { # name → loader without
    'function': lambda p: shuffled(), 'DataLoader': lambda p: td.DataLoader(list(zip(x,y)), 8, shuffle=True), 'workers': lambda p: td.DataLoader(list(zip(x,y)), 8, shuffle=True, num_workers=2),
    'endless': lambda p: td.DataLoader(Stream(None), 8), 'generator': lambda p: function(200)(), 'hf': lambda p: td.DataLoader(hf(True), 8, collate_fn=hf_bytes), 'list': lambda p: list(function()()),
    'fastai': lambda p: tensor_dls((x,y), bs=8, device='cpu').train}

def notices(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); f()
    return [str(o.message) for o in w if 'read again' in str(o.message)]

@pytest.fixture(scope='module')
def kill(tmp_path_factory):
    "Kill a run at an event and let it go on; it ends as one that nobody kills. What that one gave is kept by `name`"
    wholes,data = {},tmp_path_factory.mktemp('data')
    def _kill(name, dl, event, nth, steps=4, every=2):
        folder = tmp_path_factory.mktemp('run')
        def run(sub, **kwargs): return test_checkpoint.make(folder/sub, 'simclr', dls=lambda: loader_dls(dl(data), function(16), steps=steps, valid_steps=2, device='cpu'), steps=every, cbs=[Seen], **kwargs)
        if (name,steps) not in wholes: test_checkpoint.fit(whole := run('whole')); wholes[name,steps] = outcome(whole)|dict(seen=whole.seen.y)
        dying = run('dying'); dying.add_cb(Die(event, nth))
        with pytest.raises(KeyboardInterrupt): test_checkpoint.fit(dying)
        learn = run('dying', seed=7); done = int(learn.resume().stem[-9:])
        said  = notices(lambda: test_checkpoint.fit(learn))
        assert same(wholes[name,steps], outcome(learn)|dict(seen=learn.seen.y))
        return said,learn.dls.train,len(learn.seen.y)-done
    return _kill

places = [('after_pred', 9), ('before_validate', 2), ('after_step', 8), ('before_epoch', 3)] # in an epoch, and at its ends
def anywhere(names): return pytest.mark.parametrize('name,event,nth', [(nm,*o) for j,nm in enumerate(names) for i,o in enumerate(places) if j==0 or i<1]) # all places for the first

@anywhere(stateful)
def test_a_loader_with_a_state_goes_on(kill, name, event, nth):
    said,dl,left = kill(name, stateful[name], event, nth)
    assert not said and (name!='imitation' or dl.dl.read==left)

@anywhere(counted)
def test_one_without_is_replayed_by_count(kill, name, event, nth):
    said,dl,_ = kill(name, counted[name], event, nth)
    assert len(said)==1 and 'takes as long as it took to read them' in said[0] and 'StatefulDataLoader' in said[0]

@pytest.mark.parametrize('event,nth', [('before_epoch', 2), ('before_validate', 2), ('after_pred', 10)])
@pytest.mark.parametrize('steps', [None, 12])
@pytest.mark.parametrize('name', ['imitation','function'])
def test_where_passes_and_epochs_meet(kill, name, steps, event, nth):
    "A pass that is used up, and has not been seen to be"
    if name=='imitation' or steps: kill(name, (stateful|counted)[name], event, nth, steps)

@pytest.mark.parametrize('event,nth', [('after_pred', 9), ('before_validate', 2), ('before_epoch', 3), ('before_epoch', 2)])
def test_a_stateful_loader_as_it_is(event, nth, tmp_path):
    "Not wrapped, it is saved too: torchdata's protocol is that of all"
    class Loader(Stateful): dataset = None
    for i,o in enumerate((Loader, lambda: Late(list(zip(x,y)), 8), lambda: torchdata_dl(list(zip(x,y)), shuffle=True))):
        test_checkpoint.check(tmp_path/f'{i}', event, nth, dls=lambda: DataLoaders(o(), []), steps=1, loss_func=nn.Identity())

def test_two_kills(tmp_path):
    "In validation, and in the validation again"
    def run(folder, seed=42): return test_checkpoint.make(tmp_path/folder, 'simclr', dls=lambda: loader_dls(shuffled(), function(16), steps=4, valid_steps=2, device='cpu'), steps=4, seed=seed)
    test_checkpoint.fit(whole := run('whole'))
    for seed,nth in ((42,2),(1,1),(2,1)):
        learn = run('dying', seed); learn.add_cb(Die('before_validate', nth)); learn.resume(missing_ok=True)
        with pytest.raises(KeyboardInterrupt): test_checkpoint.fit(learn)
    learn = run('dying', seed=9); learn.resume(); test_checkpoint.fit(learn)
    assert same(outcome(whole), outcome(learn))

def test_other_steps_are_refused(tmp_path):
    def run(steps, dl): return test_checkpoint.make(tmp_path, 'simclr', dls=lambda: loader_dls(dl, steps=steps, device='cpu'), steps=1)
    dying = run(4, function()); dying.add_cb(Die('after_pred', 6))
    with pytest.raises(KeyboardInterrupt): test_checkpoint.fit(dying)
    for steps,dl in ((5, function()), (4, td.DataLoader(Stream(), 8))):
        (learn := run(steps, dl)).resume()
        with pytest.raises(ValueError, match='batches: 4 → 5' if steps==5 else 'loader'): test_checkpoint.fit(learn)
    (learn := run(4, function(8))).resume()
    with pytest.raises(ValueError, match='fewer batches than in the run, which had used 5'): test_checkpoint.fit(learn)
    (learn := run(4, function(8))).resume(override='data'); test_checkpoint.fit(learn) # other images, from their beginning

def test_a_generator_cannot_go_back():
    dl = StreamDL(function(200)(), 4)
    for i,b in enumerate(dl):
        if i==1: state = dl.state_dict()
    with pytest.raises(ValueError, match=r'generator of batches to train on has given more than the run had used \(2\), and cannot go back'): dl.load_state_dict(state)

def test_a_state_that_no_file_can_hold(tmp_path):
    class Odd(Stateful):
        def state_dict(self): return dict(o=object())
    learn = test_checkpoint.make(tmp_path, 'simclr', dls=lambda: loader_dls(Odd(), steps=4, device='cpu'), steps=1)
    with pytest.raises(TypeError, match='state_dict of the training loader holds a object, which a checkpoint cannot hold'): test_checkpoint.fit(learn)

def test_settings_name_the_loader_inside():
    learn = learner('simclr', loader_dls(td.DataLoader(list(zip(x,y)), 8, shuffle=True), steps=4, device='cpu')); quiet(learn, 1)
    a = run_settings(learn)
    assert a['batches']==4 and a['bs']==8 and a['loader']==['DataLoader', True] and a['data']['n']==40
    learn.dls = loader_dls(function(), steps=4, device='cpu')
    assert run_settings(learn)['loader']==['function', None]

# ---- processes

def uneven(sizes):
    "Batches of this process; each has images of its own"
    def batches():
        for i,n in enumerate(sizes[rank()]): yield x[rank()*20+i:rank()*20+i+n]
    return batches

def parallel(folder):
    from self_supervised import dist, queue
    from self_supervised.vision import simclr
    sent = []
    for m in (dist, queue, simclr): m.rank_sizes = lambda t, equal_sizes=False, old=dist.rank_sizes: (sent.append(not equal_sizes), old(t, equal_sizes))[1]
    def run(dl, **kwargs):
        set_seed(0); sent.clear()
        learn = learner('simclr', loader_dls(dl, device='cpu', **kwargs), cbs=(seen:=Seen()))
        with learn.distrib_ctx(): quiet(learn, 2)
        return dict(losses=[float(o) for o in learn.recorder.losses], asked=any(sent), calls=len(sent), n=learn.dls.train.n, first=seen.x[0][0].clone(), steps=len(seen.y))
    full = uneven([[4]*6]*2)
    return dict(asked=run(full, steps=3), told=run(full, steps=3, equal_batches=True), uneven=run(uneven([[4,4,3],[4,2,4]]), steps=3),
                loader=run(td.DataLoader(x[rank()*20:rank()*20+18], 4, drop_last=True)))

@pytest.mark.slow
def test_processes_have_loaders_of_their_own(tmp_path):
    a,b = on_ranks(parallel, tmp_path, 2)
    for k in a:
        assert a[k]['losses']==pytest.approx(b[k]['losses']) and a[k]['n']==(32 if k=='loader' else 24) or k=='loader'
        assert not torch.equal(a[k]['first'], b[k]['first']) and a[k]['calls']
        assert a[k]['asked']==b[k]['asked']==(k in ('asked','uneven'))
    assert a['asked']['losses']==a['told']['losses'] and a['told']['steps']==6 and a['loader']['steps']==8

def test_batches_are_sent_without_waiting(monkeypatch):
    said = []
    monkeypatch.setattr('self_supervised.loaders.to_device', lambda b, device, non_blocking=False: said.append((device.type, non_blocking)) or b)
    list(loader_dls([torch.zeros(2,3,4,4)]*2, device=torch.device('meta')).train)
    assert said==[('meta',True)]*2
