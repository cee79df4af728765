"""A method that is written here and nowhere else does all that the rest of the house expects of a method: what it needs to say, it can say in the contract

It has what the present methods lack: a teacher that follows the model, a predictor, views of two kinds, labels, values that move, an argument called like one of the optimizer."""
import inspect, itertools, math
from copy import deepcopy

import pytest, torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from fastcore.meta import delegates
from torch import nn
from torch.nn import functional as F

import methods as small, test_contracts, test_learner
from methods import augs, encoder, images, learner, loaders, model, quiet
from self_supervised import methods, recipes
from self_supervised.augmentations import get_batch_augs, get_multi_aug_pipelines
from self_supervised.checkpoint import Checkpoint, load_encoder
from self_supervised.core import SSLCallback, encoder_of, ssl_callback
from self_supervised.data import tensor_dls
from self_supervised.diagnostics import CollapseMonitor
from self_supervised.evaluation import extract_features, knn
from self_supervised.layers import create_mlp_module, encoder_dim
from self_supervised.methods import method_of, register_method, ssl_methods
from self_supervised.multicrop import multicrop
from self_supervised.recipes import get_recipe, setting_info
from self_supervised.vision.swav import SWAV

# ---- the method

@delegates(get_batch_augs, but=['size', 'resize_scale', 'flip_p'])
def get_toy_aug_pipelines(
    size:int=224, # of the views, in pixels
    **kwargs # as in `get_batch_augs`
) -> list: # two view pipelines, of different kinds
    "A view of much of the image, and one of a small part that may be upside down"
    return [get_multi_aug_pipelines(1, size, resize_scale=s, flip_p=p, **kwargs)[0] for s,p in (((.6,1.), 0.), ((.1,.5), .5))]

class ToyModel(nn.Module):
    "A student, a predictor, and a teacher that follows the student"
    def __init__(self, encoder, projector, predictor):
        super().__init__()
        self.encoder,self.projector,self.predictor = encoder,projector,predictor
        self.teacher = deepcopy(nn.Sequential(encoder, projector)).requires_grad_(False)

    def forward(self, x): return self.predictor(self.projector(multicrop(self.encoder, x))) if isinstance(x, (list,tuple)) else self.encoder(x)

def create_toy_model(
    encoder:nn.Module, # images → features
    hidden_size:int=64, # width of projector and predictor
    projection_size:int=16, # size of a projection
    bn:bool=True, # batch norm in both
    n_features:int=None, # of the encoder; None: found by a trial run
) -> ToyModel:
    "A `ToyModel` around `encoder`"
    return ToyModel(encoder, *(create_mlp_module(n, hidden_size, projection_size, bn=bn) for n in (n_features or encoder_dim(encoder), projection_size)))

def toy_loss(preds, targets, labels, weight=.1):
    "Each view's prediction should be like the teacher's projection of the other view, and like the predictions of the same class"
    p,t = F.normalize(preds, dim=2),F.normalize(targets, dim=2)
    alike = (labels[:,None]==labels)
    return sum((2-2*(p[i]*t[1-i]).sum(1)).mean() - weight*(p[i]@p[i].T)[alike].mean() for i in (0,1))/2

class Toy(SSLCallback):
    "Pretrain with a teacher"
    min_views,needs_labels = 2,True
    def __init__(self,
        aug_pipelines:list, # two view pipelines
        mom:float=.9, # of the teacher, at first; 1 in the end
        weight:float=.1, # of the labels
        print_augs:bool=False, # print the view pipelines
    ):
        super().__init__(aug_pipelines, print_augs)
        if not 0<=mom<=1: raise ValueError(f'mom={mom} must be from 0 to 1: 0.9 is usual')
        self.mom,self.weight = mom,weight

    def targets(self, views): return torch.stack([self.ssl_model.teacher(o) for o in views[:2]])
    def schedules(self): return {'mom': lambda share: 1-(1-self.mom)*(1+math.cos(math.pi*share))/2, 'opt.wd': lambda share: .01+.03*share}
    def lf(self, pred): return toy_loss(pred.unflatten(0, (len(self.views),-1)), self.target, self.learn.yb[0] if self.learn.yb[0].ndim==1 else torch.zeros(len(self.views[0])), self.weight)
    def remedies(self, state): return state.change(mom=.99) + state.add_bn + super().remedies(state)

    @torch.no_grad()
    def stepped(self):
        m = self.ssl_model
        for t,s in zip(m.teacher.parameters(), [*m.encoder.parameters(), *m.projector.parameters()]): t.lerp_(s, 1-self.now['mom'])

    @staticmethod
    def judged(model): return model.teacher[0] if isinstance(model, ToyModel) else model

class Everything(nn.Module):
    "A model of another method, with parts that are called like SwAV's"
    def __init__(self, encoder):
        super().__init__()
        self.encoder,self.projector,self.prototypes,self.queue,self.predictor = encoder,nn.Linear(8,8),nn.Linear(8,10,bias=False),nn.Linear(1,1),nn.Linear(8,8)
    def forward(self, x): return self.projector(multicrop(self.encoder, x))

class Thing(SSLCallback):
    def lf(self, pred): return pred.square().mean()

# ---- registered for these tests only

@pytest.fixture(scope='module', autouse=True)
def registered():
    before = dict(recipes._recipes)
    small.methods['toy'] = register_method('toy', Toy, ToyModel, create_toy_model, get_toy_aug_pipelines, toy_loss, recipes=dict(
        toy_fast={'bs':8, 'epochs':3, 'warmup_epochs':1., 'opt':'sgd', 'mom':.8, 'callback.mom':.5, 'weight':.2, 'size':12, 'hidden_size':16, 'arch':'test_resnet', 'precision':'fp32',
                  'jitter':False, 'bw':False, 'blur':False, 'stats':None},
        toy_slow={'like':'toy_fast', 'callback.mom':.99}))
    register_method('everything', Thing, Everything, Everything, get_toy_aug_pipelines, toy_loss)
    yield
    del small.methods['toy'], methods._methods['toy'], methods._methods['everything']
    recipes._recipes.clear(); recipes._recipes.update(before)

# ---- what every method promises: the tests of `test_contracts.py` and `test_learner.py`, as they are

def inherited(*modules, but):
    "Their tests of a method, with the values that they are run with; one that names SwAV as an example is run for the toy instead"
    for mod in modules:
        for nm,f in vars(mod).items():
            if not nm.startswith('test_') or nm in but or 'name' not in inspect.signature(f).parameters: continue
            marks = [o.args for o in getattr(f, 'pytestmark', []) if o.name=='parametrize']
            sets  = [[dict(zip(names, o if len(names)>1 else [o])) for o in values] for names,values in ((a.split(','), b) for a,b in marks) if names!=['name']]
            sets  = [[o for o in s if o.get('name', 'swav')=='swav'] for s in sets]
            for i,kw in enumerate(itertools.product(*sets)): yield pytest.param(f, {k:v for o in kw for k,v in o.items()} | dict(name='toy'), id=f'{nm}-{i}')

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('test,kwargs', list(inherited(test_contracts, test_learner, but=['test_registered_names']))) # it has no module of its own
def test_inherited(test, kwargs, request):
    test(**kwargs, **{k:request.getfixturevalue(k) for k in inspect.signature(test).parameters if k not in kwargs})

def test_inherits():
    "As many as a method has there"
    found = [o.values[0].__name__ for o in inherited(test_contracts, test_learner, but=['test_registered_names'])]
    assert len(found)>80 and {'test_trains', 'test_lr_find_leaves_no_trace', 'test_save_and_load', 'test_mixed_precision_of_fastai', 'test_export', 'test_the_model_of_another_method',
                              'test_however_a_fit_ends_the_learner_is_its_own_again', 'test_order_and_autocast', 'test_wrong_model_or_data'} <= set(found)

@pytest.mark.parametrize('other', ['toy', 'everything'])
@pytest.mark.parametrize('name', small.methods)
def test_no_old_method_takes_a_new_model(name, other):
    "However its parts are called"
    m = Everything(encoder()) if other=='everything' else model('toy')
    with pytest.raises(ValueError, match=f'the model is a {type(m).__name__}, and {ssl_methods()[name].callback.__name__} trains a '): quiet(learner(name, m=m), 1)
    quiet(learner(name), 1) # and its own is as good as before

# ---- what this one has and the others have not

def toy(dls=None, cbs=(), mom=.9, seed=0, **kwargs):
    torch.manual_seed(seed)
    return learner('toy', dls, cb=Toy(augs('toy'), mom=mom), cbs=cbs, **kwargs)

def teacher(learn): return [o.clone() for o in learn.model.teacher.parameters()]
def student(learn): return [o.detach().clone() for o in [*learn.model.encoder.parameters(), *learn.model.projector.parameters()]]
def equal(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

def test_known():
    learn = toy()
    assert method_of(learn.model).name==method_of(ssl_callback(learn)).name=='toy' and ssl_callback(learn) is learn.toy
    assert not any(p is q for p in learn.model.teacher.parameters() for q in (learn.create_opt() or learn.opt).all_params()[0])

def test_targets():
    "Under autocast and without gradient; the loss sees them in float32, outside autocast"
    seen,learn = [],toy()
    class Autocast(Callback): # what MixedPrecision does on a GPU
        order = MixedPrecision.order
        def before_batch(self): self.ac = torch.autocast('cpu', torch.bfloat16); self.ac.__enter__()
        def after_loss(self): self.ac.__exit__(None, None, None)
    cb = learn.toy
    targets,lf = cb.targets,cb.lf
    def _targets(views):
        t = targets(views)
        seen.append(('targets', torch.is_autocast_enabled('cpu'), torch.is_grad_enabled(), t.dtype, t.requires_grad, views is cb.views))
        return t
    def _lf(pred):
        seen.append(('loss', torch.is_autocast_enabled('cpu'), torch.is_grad_enabled(), cb.target.dtype, cb.target.requires_grad, pred.dtype==torch.float32))
        return lf(pred)
    cb.targets,cb.lf = _targets,_lf
    quiet(learn, 1, cbs=Autocast())
    t,l = ('targets', True, False, torch.bfloat16, False, True),('loss', False, True, torch.float32, False, True)
    assert seen[:2]==[t, l] and set(seen)=={t, l, (*l[:2], False, *l[3:])} and len(seen)==2*(5+2) # no gradient in validation
    assert cb.target is None and cb.views is None # nothing of the last batch is kept

class Steps(Callback):
    "Teacher, student and momentum before and after each batch"
    order = 90
    def before_fit(self): self.seen,self.wds,self.count = [],[],0
    def before_batch(self): self.before = teacher(self.learn)
    def before_step(self): self.wds.append(self.opt.hypers[0]['wd'])
    def after_step(self): self.count += 1
    def after_batch(self):
        if self.training: self.seen.append((self.before, teacher(self.learn), student(self.learn), self.learn.toy.now['mom'], self.count))

def check_moves(steps, counts):
    "The teacher moved in those batches in which the number of steps grew, by its momentum"
    done = 0
    for (before,after,now,mom,_),n in zip(steps, counts, strict=True):
        want = [t.lerp(s, 1-mom) if n>done else t for t,s in zip(before, now)]
        assert equal(after, want) and equal(before, after)==(n==done)
        done = n

def test_teacher():
    "After every step it is m·teacher + (1−m)·student, with a momentum that goes to 1"
    learn = toy(cbs=[Steps()]); quiet(learn, 2)
    check_moves(learn.steps.seen, range(1, 11))
    moms = [o[3] for o in learn.steps.seen]
    assert moms==[pytest.approx(1-.1*(1+math.cos(math.pi*i/10))/2) for i in range(10)]
    assert learn.steps.wds==[pytest.approx(.01+.003*i) for i in range(10)] # what is called opt.… is the optimizer's

def test_gradient_accumulation():
    "Two batches a step: teacher and schedule move with the optimizer"
    learn = toy(loaders('toy', images(32)), cbs=[GradientAccumulation(16), Steps()]); quiet(learn, 2)
    check_moves(learn.steps.seen, [0,1,1,2,2,3,3,4])
    assert [o[3] for o in learn.steps.seen]==[pytest.approx(1-.1*(1+math.cos(math.pi*i/4))/2) for i in (0,0,1,1,2,2,3,3)] and learn.toy.steps_done==4

def test_skipped_step():
    "One that mixed precision skips, as its gradients were not finite, is none"
    class Skip(Callback):
        order = MixedPrecision.order
        def before_step(self):
            if self.train_iter in (0,3): raise CancelStepException
    learn = toy(cbs=[Skip(), Steps()]); quiet(learn, 1)
    check_moves(learn.steps.seen, [0,1,2,2,3])
    assert learn.toy.steps_done==3

@pytest.mark.parametrize('skipped', [False, True])
def test_freezing_counts_steps_of_the_optimizer(skipped):
    "SwAV's prototypes are fixed for two steps, which are four batches when two make a step; skipped ones do not count"
    class Look(Callback):
        order = 90
        def before_fit(self): self.seen,self.first = [],self.learn.model.prototypes.weight.clone()
        def after_batch(self):
            if self.training: self.seen.append(torch.equal(self.learn.model.prototypes.weight, self.first))
    class Skip(Callback):
        order = MixedPrecision.order
        def before_step(self):
            if skipped and self.train_iter==1: raise CancelStepException
    learn = learner('swav', loaders('swav', images(64)), cb=SWAV(augs('swav'), [0,1], K=None, freeze_prototypes_niters=2), cbs=[GradientAccumulation(16), Look(), Skip()])
    learn.dls.train.shuffle = False
    quiet(learn, 1)
    assert learn.look.seen==[True]*(7 if skipped else 5)+[False]*(1 if skipped else 3)

def test_a_second_input_is_refused():
    dls = DataLoaders(DataLoader([(o,o,0) for o in torch.rand(16,1,14,14)], bs=8), [])
    with pytest.raises(ValueError, match='a batch has 2 inputs, and Toy takes 1.*n_inp=1'): quiet(toy(dls, loss_func=nn.Identity()), 1)

def test_labels_count():
    "And with labels the loss is another"
    def run(y):
        learn = toy(tensor_dls((images(), y), bs=8)); learn.dls.train.rng.seed(0); quiet(learn, 1)
        return float(learn.recorder.losses[-1])
    assert run(torch.zeros(40, dtype=torch.long))!=run(torch.arange(40))
    with pytest.raises(ValueError, match=r'Toy learns from labels and this data has none: pass label_func to image_dls, \(images, labels\) to tensor_dls'): quiet(toy(tensor_dls(images(), bs=8)), 1)

def test_what_is_judged(tmp_path):
    "Evaluation, features and the file of the encoder are those of the teacher, which is what this method declares"
    learn = toy(loaders('toy', images(), images(12)), mom=0.); quiet(learn, 1)
    t = learn.model.teacher[0]
    assert encoder_of(learn) is encoder_of(learn.model) is t is not learn.model.encoder and encoder_of(t) is t
    dl = loaders('toy', images(), images(12)).valid
    feats = extract_features(learn, dl)[0]
    assert torch.equal(feats, extract_features(t, dl)[0]) and not torch.equal(feats, extract_features(learn.model.encoder, dl)[0])
    dls = loaders('toy', images(), images(12))
    assert knn(learn, dls, k=3).accuracy==knn(t, dls, k=3).accuracy
    learn.export_encoder(tmp_path/'e')
    assert equal(load_encoder(tmp_path/'e', encoder()).parameters(), t.parameters())

@pytest.mark.parametrize('at', [4, 5, 7]) # in the first epoch, between the two, in the second
def test_resume(at, tmp_path):
    "A run that is cut off and gone on with is the whole run, teacher and schedule too"
    def run(folder, stop=None, seed=0):
        class Stop(Callback):
            order = 110
            def after_batch(self):
                if self.training and self.train_iter==stop: raise KeyboardInterrupt
        learn = toy(cbs=[Checkpoint(tmp_path/folder, minutes=None, steps=1), Stop(), Steps()], seed=seed)
        set_seed(seed); learn.dls.train.rng.seed(seed)
        if seed: learn.resume()
        try: quiet(learn, 2, 1e-2)
        except KeyboardInterrupt: assert stop
        return learn
    learn = run('whole')
    run('cut', stop=at)
    again = run('cut', seed=5)
    a,b = learn.model.state_dict(),again.model.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [o[3] for o in again.steps.seen]==[o[3] for o in learn.steps.seen] and again.toy.steps_done==10

def test_monitor():
    "It warns, with the remedies of the method first"
    learn = toy(loaders('toy', torch.zeros(40,1,14,14)), cbs=[CollapseMonitor(every=1, patience=2, warmup=0)])
    with pytest.warns(UserWarning, match=r'(?s)looks like a collapse.*1\. Toy\(mom=0\.99\), now 0\.9'): quiet(learn, 1)
    assert list(learn.collapse_monitor.history)==['step', 'std', 'rank'] # neither chance nor codes
    learn = toy(cbs=[CollapseMonitor(every=1, warmup=100)]); quiet(learn, 1)
    assert not learn.collapse_monitor.warning

def test_recipe():
    "The setting that is called like the optimizer's has a name of its own, and both arrive"
    r = get_recipe('toy_fast')
    assert (r.mom, r.settings['callback.mom'])==(.8, .5) and get_recipe('toy_slow').settings['callback.mom']==.99 and get_recipe('toy_slow').mom==.8
    assert 'callback.mom' in setting_info() and 'callback  callback.mom=0.5, weight=0.2' in str(r)
    learn = r.learner(loaders('toy', images(), images(12)), encoder())
    assert (learn.toy.mom, learn.toy.weight)==(.5, .2) and isinstance(learn.model, ToyModel) and learn.model.projector[0].out_features==16
    with learn.no_bar(), learn.no_logging(): r.fit(learn)
    assert learn.opt.hypers[0]['mom']==.8 and learn.toy.steps_done==15
    assert get_recipe('toy_fast', **{'callback.mom':.7}).create_callback(n_in=1).mom==.7
    with pytest.raises(ValueError, match='n_protos is no setting of a toy recipe'): get_recipe('toy_fast', n_protos=3)
    assert 'callback.mom' not in get_recipe('swav_small').names and get_recipe('simclr_small').mom==.9
