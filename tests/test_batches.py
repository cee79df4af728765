"Batches of every form, in fit and evaluation alike; loaders and callbacks that a fit cannot do with"
import warnings
from collections import namedtuple
from copy import deepcopy

import pytest, torch
import torch.utils.data as td
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import lr_find # noqa: F401 (patches Learner)
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import AvgMetric, Learner, load_learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.augment import Flip, RandomErasing, aug_transforms
from fasttransform import Pipeline
from torch import nn

from self_supervised.basics import warn_once
from self_supervised.core import SSLCallback
from self_supervised.data import tensor_dls
from self_supervised.evaluation import OnlineKNN, OnlineProbe, extract_features
from self_supervised.heads import model_splitter

from methods import callback, images, learner, loaders, methods, model, quiet

each_method = pytest.mark.parametrize('name', list(methods))

def said(f):
    "What `f` warns of"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); warn_once.cache_clear(); f()
    return [str(o.message) for o in w if o.category is UserWarning]

n = 9 # with batches of 4 the last one has a single image
x = torch.rand(n,1,14,14, generator=torch.Generator().manual_seed(0))
y = torch.arange(n)%3

# ---- 1.1 what a loader may yield

forms = { # name → (an item, are there labels?)
    'x': (lambda x,y,nm: x, False), '(x,)': (lambda x,y,nm: (x,), False), '(x,y)': (lambda x,y,nm: (x,y), True), '(x,name)': (lambda x,y,nm: (x,nm), False), '(name,x)': (lambda x,y,nm: (nm,x), False),
    '(x,y,name)': (lambda x,y,nm: (x,y,nm), True), '(x,name,y)': (lambda x,y,nm: (x,nm,y), True), '(name,x,y)': (lambda x,y,nm: (nm,x,y), True),
    'image': (lambda x,y,nm: dict(image=x), False), 'image, label': (lambda x,y,nm: dict(image=x, label=y), True), 'name, images, labels': (lambda x,y,nm: dict(path=nm, images=x, labels=y), True),
    'labels, pixel_values': (lambda x,y,nm: dict(labels=y, pixel_values=x), True), 'img, target': (lambda x,y,nm: dict(img=x, target=y), True), 'x, y': (lambda x,y,nm: dict(x=x, y=y), True),
    'image, name': (lambda x,y,nm: dict(image=x, file_name=nm), False)}
torch_dl,fastai_dl,tfmd_dl = (lambda items, **kw: td.DataLoader(items, 4, **kw)),(lambda items, **kw: DataLoader(items, bs=4, **kw)),(lambda items, **kw: TfmdDL(items, bs=4, num_workers=0, **kw))
makers = dict(torch=torch_dl, fastai=fastai_dl, TfmdDL=tfmd_dl)

def form_dl(form, make='torch', x=x, **kwargs): return makers[make]([forms[form][0](a, int(b), f'{i}.jpg') for i,(a,b) in enumerate(zip(x, y))], **kwargs)

class Mean(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return self.w*(x[0] if isinstance(x, list) else x).flatten(1)

class Brightness(SSLCallback):
    "The loss is the mean of the images, so it says which came"
    def lf(self, pred): return pred.mean()

class Batches(Callback):
    "What a method leaves in `xb` and `yb`"
    order = 90
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append((len(self.xb), len(self.yb), len(self.yb[0])))

def toy(dls, cbs=(), **kwargs): return Learner(dls, Mean(), loss_func=nn.Identity(), opt_func=SGD, cbs=[Brightness([Pipeline([lambda x: x], split_idx=0)]), *cbs], **kwargs)

each_form = pytest.mark.parametrize('form,make', [(f, m) for f in forms for m in makers])

@each_form
def test_each_form_in_a_fit_and_in_evaluation(form, make):
    "The same images and labels everywhere, and the loss is that of all images of a batch"
    labelled,losses = forms[form][1],[]
    class Hear(Callback):
        def after_loss(self): losses.append(self.loss.item())
    learn = toy(DataLoaders(form_dl(form, make), form_dl(form, make)), [look:=Batches(), Hear()])
    quiet(learn, 1, lr=0.)
    want = [o.mean().item() for o in x.split(4)]
    assert losses==pytest.approx(want*2, rel=1e-5) and look.seen==[(1,1,4),(1,1,4),(1,1,1)]*2
    assert '_split' not in vars(learn)
    feats,labels = extract_features(Mean(), form_dl(form, make))
    assert torch.allclose(feats, x.flatten(1)) and (torch.equal(labels, y) if labelled else labels is None)
    assert not said(lambda: extract_features(learn, form_dl(form, make)))

@pytest.mark.parametrize('form', forms)
def test_each_form_while_it_trains(form):
    "OnlineKNN finds each image itself, or says that there are no labels"
    def fit(): 
        learn = toy(DataLoaders(form_dl('(x,)'), []), [OnlineKNN((form_dl(form), form_dl(form)), k=1), OnlineProbe((form_dl(form), form_dl(form)))])
        quiet(learn, 1, lr=0.)
        return learn.recorder.values[-1][-2:]
    if forms[form][1]: assert fit()[0]==1.
    else:
        with pytest.raises(ValueError, match='label'): fit()

@pytest.mark.parametrize('form', ['x','(x,y,name)','image, label'])
@each_method
def test_each_method_takes_them(name, form):
    make = 'fastai' if methods[name].callback.assigns_all else 'torch'
    items = [forms[form][0](o, i%4, f'{i}.jpg') for i,o in enumerate(images(40))]
    dls = DataLoaders(*(makers[make](items, drop_last=True) for _ in range(2)))
    if methods[name].callback.needs_labels and not forms[form][1]: pytest.skip('it needs labels')
    learn = learner(name, dls, loss_func=nn.Identity())
    quiet(learn, 2)
    assert len(learn.recorder.losses)==20 and all(torch.isfinite(o) for o in learn.recorder.losses)
    assert len(getattr(learn, callback(name).name).show())==len(augs_of(learn))

def augs_of(learn): return next(o for o in learn.cbs if isinstance(o, SSLCallback)).aug_pipelines

def test_named_tuples_in_evaluation():
    "fastai itself cannot move them to a device"
    Named = namedtuple('Named', 'picture number')
    feats,labels = extract_features(Mean(), td.DataLoader([Named(*o) for o in zip(x, y)], 4))
    assert torch.allclose(feats, x.flatten(1)) and torch.equal(labels, y)

def test_names_in_the_blocks_of_fastai():
    "Datasets guess that all but the last are inputs; names are none"
    for order in ((0,1,2),(0,2,1),(2,0,1)):
        tfms = [[x.__getitem__], [y.__getitem__], [lambda i: f'{i}.jpg']]
        dls = Datasets(range(n), [tfms[i] for i in order], splits=[range(n),range(n)]).dataloaders(bs=3, num_workers=0)
        learn = toy(dls, [look:=Batches()]); quiet(learn, 1)
        assert set(look.seen)=={(1,1,3)}

@pytest.mark.parametrize('item,says', [
    (lambda x,y: dict(picture=x, label=y), 'a dict with picture, label, and what is an image there.*pixel_values.*collate_fn'),
    (lambda x,y: dict(label=y), 'a dict with label'), (lambda x,y: 'a.jpg', 'only words'), (lambda x,y: ('a.jpg',), 'only words'),
    (lambda x,y: ([x,x],y), 'a list of 2: give one tensor.*aug_pipelines'), (lambda x,y: (dict(image=x),y), 'a dict of 1: give one tensor'),
    (lambda x,y: (y,x), r'shape \(B,C,H,W\)'), (lambda x,y: y, r'shape \(B,C,H,W\)')],
    ids='no image key,no image,names,a tuple of names,two views,a dict in a tuple,label first,labels only'.split(','))
def test_forms_that_are_none(item, says):
    dl = td.DataLoader([item(a, int(b)) for a,b in zip(x, y)], 4)
    with pytest.raises(ValueError, match=f'(?s){says}'): quiet(toy(DataLoaders(dl, [])), 1)
    with pytest.raises(ValueError, match=f'(?s){says}'): extract_features(Mean(), dl)

def test_two_images_are_not_one():
    "Whoever brings pairs of images would think that they are the views"
    dl = td.DataLoader([(a,a,int(b)) for a,b in zip(x, y)], 4)
    with pytest.raises(ValueError, match='has 2 inputs, and Brightness takes 1'): quiet(toy(DataLoaders(dl, [])), 1)
    words = said(lambda: extract_features(Mean(), dl))
    assert len(words)==1 and '3 parts, and 1 not used' in words[0]
    assert torch.equal(extract_features(Mean(), dl)[1], y)

@pytest.mark.parametrize('item,says', [(lambda x,y: (x,y,y), '3 parts, and 1 not used'), (lambda x,y: dict(image=x, label=y, width=3, file='a.jpg'), 'not used: width'),
                                       (lambda x,y: dict(image=x, img=x), 'image is taken for the images; not used: img'), (lambda x,y: dict(image=x, label='cat'), 'label in a batch holds words.*Number the classes')])
def test_what_is_left_over_is_named_once(item, says):
    import re
    dl = td.DataLoader([item(a, int(b)) for a,b in zip(x, y)], 4)
    words = said(lambda: quiet(toy(DataLoaders(dl, dl)), 2))
    assert len(words)==1 and re.search(says, words[0])

# ---- 1.1 the Learner is as it was

@pytest.mark.parametrize('event', ['before_batch','after_loss','after_batch','before_validate'])
@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_fastai_cuts_batches_as_ever(event, ex, tmp_path):
    def stop(self): raise ex('on purpose')
    learn = toy(DataLoaders(form_dl('(x,y)'), form_dl('(x,y)')), path=tmp_path)
    with pytest.raises(ex): quiet(learn, 1, cbs=type('Stop', (Callback,), {event:stop})())
    learn.remove_cb(Brightness)
    learn._split((1,2,3))
    assert (learn.xb,learn.yb)==((1,2),(3,)) and '_split' not in vars(learn) # all but the last are inputs: that is fastai's own

def test_after_an_exception_it_can_be_exported(tmp_path):
    def stop(self): raise KeyboardInterrupt
    learn = learner('simclr', loaders('simclr', images()), path=tmp_path)
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, cbs=type('Stop', (Callback,), dict(after_loss=stop))())
    learn.export('whole.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'whole.pkl')
    back.remove_cb(methods['simclr'].callback); back._split((1,2,3))
    assert back.xb+back.yb==(1,2,3) and '_split' not in vars(back)

def test_cancelled_epochs_leave_nothing():
    from fastai.callback.core import CancelEpochException, CancelFitException
    for ex in (CancelEpochException, CancelFitException):
        def stop(self): raise ex
        learn = toy(DataLoaders(form_dl('x'), []))
        try: quiet(learn, 1, cbs=type('Stop', (Callback,), dict(after_loss=stop))())
        except IndexError: pass # fastai's recorder, of an epoch without a loss
        assert '_split' not in vars(learn)

def test_find_a_learning_rate_and_export(tmp_path):
    learn = learner('simclr', DataLoaders(td.DataLoader(list(images(40)), 8), []), loss_func=nn.Identity(), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False)
    assert '_split' not in vars(learn)

# ---- loaders

class Stream(td.IterableDataset):
    def __iter__(self): return iter(zip(x, y))
class Counted(Stream):
    def __len__(self): return n

@pytest.mark.parametrize('make', makers)
def test_streams(make):
    if make=='torch': quiet(toy(DataLoaders(torch_dl(Counted()), [])), 1)
    for which,dls in (('train',lambda: DataLoaders(makers[make](Stream()), [])), ('valid',lambda: DataLoaders(form_dl('x'), makers[make](Stream())))):
        with pytest.raises(ValueError, match=f'dls.{which} is a stream without a length.*`__len__`'): quiet(toy(dls()), 1)
    if make!='TfmdDL': assert torch.equal(extract_features(Mean(), makers[make](Stream()))[1], y)

@pytest.mark.parametrize('more', [[], [None]], ids=['one loader','None'])
def test_no_validation_loader(more):
    with pytest.raises(ValueError, match=r'no validation loader.*DataLoaders\(train, \[\]\)'): quiet(toy(DataLoaders(form_dl('x'), *more)), 1)

# ---- 1.5 callbacks beside a method, without validation images and with them

def board(**kwargs):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    return TensorBoardCallback(**dict(trace_model=False, log_preds=False) | kwargs)

def wandb_callback(**kwargs):
    pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    return WandbCallback(**kwargs)

def beside(name, cbs, valid=False, tmp_path=None, **kwargs): return learner(name, loaders(name, images(), *([images(12)] if valid else [])), cbs=cbs, path=tmp_path, **kwargs)

@pytest.mark.parametrize('cb,valid,says', [
    (SaveModelCallback, False, r"follows valid_loss, and there are no validation images: take SaveModelCallback\(monitor='train_loss'\).*'knn' of OnlineKNN"),
    (EarlyStoppingCallback, False, "EarlyStoppingCallback.monitor='train_loss'"), (ReduceLROnPlateau, False, "ReduceLROnPlateau.monitor='train_loss'"),
    (lambda: SaveModelCallback(monitor='knn'), False, 'follows knn, and the progress table has no such column: it has train_loss$'),
    (lambda: EarlyStoppingCallback(monitor='accuracy'), True, 'no such column: it has train_loss, valid_loss$'),
    (ShowGraphCallback, False, 'no validation images: LossGraph'), (board, False, 'no validation images: take TensorBoardLogger of self_supervised.loggers$'),
    (lambda: board(log_preds=True), True, r'a method predicts views: take TensorBoardLogger of self_supervised.loggers, or TensorBoardCallback\(log_preds=False\)'),
    (wandb_callback, False, 'take WandbLogger'), (lambda: wandb_callback(log_preds=False), True, 'take WandbLogger')],
    ids='save early plateau no-column no-column-with-validation graph board board-predictions wandb wandb-with-validation'.split())
def test_callbacks_that_fail_late_are_refused_at_the_start(cb, valid, says, tmp_path):
    learn = beside('simclr', cb(), valid, tmp_path)
    with pytest.raises(ValueError, match=f'(?s){says}'): learn.fit(1)
    assert not getattr(learn.recorder, 'losses', None)

def test_a_metric_of_ones_own_has_no_value_without_validation(tmp_path):
    learn = beside('simclr', SaveModelCallback(monitor='mine'), tmp_path=tmp_path, metrics=AvgMetric(mine))
    with pytest.raises(ValueError, match='this data has no labels|follows mine, and there are no validation images'): quiet(learn, 1)

def mine(pred, y): return torch.zeros(1)

@pytest.mark.parametrize('cb', [lambda: SaveModelCallback(monitor='train_loss'), lambda: EarlyStoppingCallback(monitor='train_loss'), lambda: ReduceLROnPlateau(monitor='train_loss'),
                                lambda: SaveModelCallback(every_epoch=True), CSVLogger], ids='save early plateau every-epoch csv'.split())
@pytest.mark.parametrize('name', ['swav','simclr'])
def test_what_the_messages_say_works(name, cb, tmp_path, capsys):
    learn = beside(name, cb(), tmp_path=tmp_path); quiet(learn, 2)
    assert len(learn.recorder.values)>=1

def test_a_column_of_the_encoder_can_be_followed(tmp_path, capsys):
    labelled = tensor_dls((images(),torch.arange(40)%2), (images(12),torch.arange(12)%2), bs=8)
    learn = beside('simclr', [OnlineKNN(labelled, k=3), SaveModelCallback(monitor='knn')], tmp_path=tmp_path); quiet(learn, 2)
    assert (tmp_path/'models'/'model.pth').exists()

@pytest.mark.parametrize('cb', [SaveModelCallback, EarlyStoppingCallback, ShowGraphCallback, board], ids='save early graph board'.split())
def test_with_validation_images_they_work_as_ever(cb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = beside('simclr', cb(), True, tmp_path); learn.fit(2)
    assert len(learn.recorder.values)>=1

def test_lr_find_beside_them(tmp_path):
    learn = beside('simclr', SaveModelCallback(), tmp_path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False)

# ---- 1.5 loggers

@pytest.mark.parametrize('valid', [False, True])
@pytest.mark.parametrize('name', ['swav','simclr'])
def test_tensorboard_says_what_the_recorder_says(name, valid, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from self_supervised.loggers import TensorBoardLogger
    learn = beside(name, TensorBoardLogger(tmp_path/'log'), valid, tmp_path); quiet(learn, 2)
    read = EventAccumulator(str(tmp_path/'log')).Reload()
    def values(tag): return [o.value for o in read.Scalars(tag)]
    assert values('train_loss')==pytest.approx([float(o) for o in learn.recorder.losses], rel=1e-5) and [o.step for o in read.Scalars('train_loss')]==list(range(1,11))
    assert values('epoch/train_loss')==pytest.approx([o[0] for o in learn.recorder.values], rel=1e-5)
    assert ('epoch/valid_loss' in read.Tags()['scalars'])==valid and values('lr_0')==pytest.approx([learn.lr]*10)
    if valid: assert values('epoch/valid_loss')==pytest.approx([o[1] for o in learn.recorder.values], rel=1e-5)

def test_wandb_is_sent_the_same(monkeypatch):
    import sys, types
    from self_supervised.loggers import WandbLogger
    rows,waiting = [],{}
    def log(numbers, commit=True):
        waiting.update(numbers)
        if commit: rows.append(dict(waiting)); waiting.clear()
    fake = types.SimpleNamespace(run=None, log=log)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    learn = beside('swav', WandbLogger())
    with pytest.raises(ValueError, match='wandb.init'): quiet(learn, 1)
    fake.run = object(); quiet(learn, 2)
    assert [o['train_loss'] for o in rows if 'train_loss' in o]==pytest.approx([float(o) for o in learn.recorder.losses])
    assert [o['epoch/train_loss'] for o in rows if 'epoch/train_loss' in o]==pytest.approx([o[0] for o in learn.recorder.values])
    assert not waiting and not any('valid' in k or v is None for o in rows for k,v in o.items())

def test_a_package_that_is_missing(monkeypatch):
    import sys
    from self_supervised.loggers import WandbLogger
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ImportError, match=r'self_supervised\[log\]'): quiet(beside('simclr', WandbLogger()), 1)

@pytest.mark.parametrize('valid', [False, True])
def test_the_graph_of_losses(valid, monkeypatch):
    from self_supervised.loggers import LossGraph
    learn,drawn = beside('simclr', LossGraph(), valid),[]
    class Spy(Callback):
        order = 61
        def before_fit(self): self.learn.progress.mbar.update_graph = lambda *args: drawn.append(args)
    with learn.no_logging(): learn.fit(2, cbs=Spy())
    (steps,losses),*more = drawn[-1][0]
    assert len(drawn)==2 and list(steps)==list(range(10)) and losses==pytest.approx([float(o) for o in learn.recorder.losses])
    assert drawn[0][1]==(0,10) and drawn[-1][2][0]==0 and drawn[-1][2][1]>=max(losses)
    if valid: assert list(more[0][0])==[5,10] and list(more[0][1])==pytest.approx([o[1] for o in learn.recorder.values])
    else: assert not more
    quiet(learn, 1) # without a bar there is nothing to draw under

# ---- 1.6 what changes images before the views

def normalize(c=1, **kwargs): return Normalize.from_stats(*(([.48]*c, [.22]*c)), cuda=False, **kwargs)

@pytest.mark.parametrize('after', [[], ['floats']], ids=['floats','bytes'])
@each_method
def test_normalised_images_are_undone(name, after):
    "The views are those of the images before: to rounding, and never cut"
    raw  = images(40) if after else images(40).float()/255
    raw[:,:,:4] = 0 # black pixels come back a little below 0
    dls  = lambda *tfms: DataLoaders(*(TfmdDL([(TensorImage(o),i%4) for i,o in enumerate(raw)], bs=8, num_workers=0, after_batch=[IntToFloatTensor()]*bool(after)+[*tfms]) for _ in range(2)))
    losses = []
    for tfms in ((), (normalize(),)):
        torch.manual_seed(0)
        learn = learner(name, dls(*tfms), model(name), loss_func=nn.Identity())
        words = said(lambda: quiet(learn, 1))
        assert len([o for o in words if 'Normalize of dls.train is undone' in o])==len(tfms) and not any('are cut to that' in o for o in words)
        losses.append([float(o) for o in learn.recorder.losses])
    assert losses[1]==pytest.approx(losses[0], rel=1e-3)
    learn.remove_cb(methods[name].callback)
    assert learn.dls.one_batch()[0].min()<-1 # the loader is as it was

def test_undone_to_rounding():
    from self_supervised.batches import unnormalized
    x = torch.rand(4,3,16,16); x[:,:,:8] = 0; x[:,:,8:10] = 1
    dl = TfmdDL([(TensorImage(o),) for o in x], bs=4, num_workers=0, after_batch=[Normalize.from_stats([.485,.456,.406],[.229,.224,.225], cuda=False)])
    got = unnormalized(dl.one_batch()[0], dl)
    assert torch.allclose(got, TensorImage(x), atol=1e-6) and got.min()==0 and got.max()==1

@pytest.mark.parametrize('low', [-1., 255.])
def test_a_range_that_was_wrong_before_stays_wrong(low):
    "Undoing is no pardon: images in [-1,1] or [0,255] under Normalize are refused as without it"
    x  = torch.rand(16,1,14,14)*2-1 if low<0 else torch.rand(16,1,14,14)*255
    dl = TfmdDL([(TensorImage(o),) for o in x], bs=8, num_workers=0, after_batch=[normalize()])
    with pytest.raises(ValueError, match='would become black or white'): quiet(learner('simclr', DataLoaders(dl, []), loss_func=nn.Identity()), 1)

@pytest.mark.parametrize('tfms,names', [([Flip()], 'Flip'), ([RandomErasing()], 'RandomErasing'), (aug_transforms(), 'Flip')], ids=['Flip','RandomErasing','aug_transforms'])
def test_distorted_images_are_named(tfms, names):
    dl = TfmdDL([(TensorImage(o),) for o in torch.rand(16,3,14,14)], bs=8, num_workers=0, after_batch=tfms)
    words = [o for o in said(lambda: quiet(learner('simclr', DataLoaders(dl, dl), model('simclr', n_in=3), loss_func=nn.Identity()), 2)) if 'after_batch of dls.train' in o]
    assert len(words)==1 and names in words[0] and 'Leave batch_tfms' in words[0]

@pytest.mark.parametrize('other', list(methods))
@each_method
def test_two_methods(name, other):
    learn = learner(name, cbs=callback(other))
    with pytest.raises(ValueError, match=f'two methods on one Learner.*remove_cb.{type(callback(other)).__name__}'): quiet(learn, 1)

# ---- 1.7 frozen encoders

def of_encoder(learn): return {k:v.clone() for k,v in learn.model.encoder.state_dict().items()}
def same(a, b): return {k for k in a if torch.equal(a[k], b[k])}

@each_method
def test_freeze_with_a_splitter(name):
    learn = learner(name, splitter=model_splitter, train_bn=False, cbs=BnFreeze)
    if any(isinstance(o, nn.BatchNorm1d) and not o.affine for o in learn.model.modules()): # fastai's BnFreeze asks for its weights
        with pytest.raises(ValueError, match='leave BnFreeze out'): quiet(learn, 1, .1)
        return
    n_all = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    learn.freeze()
    assert sum(p.numel() for g in learn.opt.param_lists for p in g)==n_all # nothing is left out of the optimizer
    before,heads = of_encoder(learn),[p.clone() for p in learn.opt.param_lists[1]]
    quiet(learn, 1, .1)
    assert same(before, of_encoder(learn))==set(before) and any(not torch.equal(a, b) for a,b in zip(heads, learn.opt.param_lists[1]))
    learn.unfreeze(); quiet(learn, 1, .1)
    assert not same(before, of_encoder(learn)) & {'0.weight','1.weight'}

def test_a_teacher_is_in_no_group():
    m = model('simclr')
    m.teacher = deepcopy(m.encoder).requires_grad_(False)
    assert [{id(o) for o in g} for g in model_splitter(m)]==[{id(o) for o in part.parameters()} for part in (m.encoder, m.projector)]
    assert [*map(len, model_splitter(nn.DataParallel(m)))]==[*map(len, model_splitter(m))]

@each_method
def test_two_groups_train_as_one(name):
    "The same numbers to the bit, and the same order of the optimizer's state"
    res = []
    for kwargs in ({}, dict(splitter=model_splitter)):
        torch.manual_seed(0)
        learn = learner(name, loaders(name, images(), images(12), seed=0), model(name), **kwargs); quiet(learn, 2, .01)
        res.append((learn.model.state_dict(), [[*s.keys()] for s in learn.opt.state_dict()['state']]))
    assert all(torch.equal(v, res[1][0][k]) for k,v in res[0][0].items()) and res[0][1]==res[1][1]

def test_statistics_of_a_frozen_encoder_move_unless_they_are_held():
    for held in (False, True):
        learn = learner('simclr', cbs=[BnFreeze] if held else [])
        learn.model.encoder.requires_grad_(False)
        before = of_encoder(learn)
        words = [o for o in said(lambda: quiet(learn, 2)) if 'cbs=BnFreeze' in o]
        assert len(words)==(not held)
        assert set(before)-same(before, of_encoder(learn))==(set() if held else {'1.running_mean','1.running_var','1.num_batches_tracked'})
    assert not any('BnFreeze' in o for o in said(lambda: quiet(learner('simclr'), 1)))
