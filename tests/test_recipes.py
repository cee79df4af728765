"Recipes say what the papers say, and what a Learner gets is what a recipe says"
import inspect, json, math, re, warnings
from copy import deepcopy

import numpy as np, pytest, timm, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.layers import apply_init
from fastai.learner import Learner, Recorder
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from methods import encoder, images, quiet
from self_supervised import methods as method_module, recipes as recipe_module, suggest # noqa: F401 (gives recipes `suggest`)
from self_supervised.augmentations import crop_kinds
from self_supervised.basics import warn_once
from self_supervised.cli import ssl_pretrain
from self_supervised.cli_command import parse
from self_supervised.methods import register_method, ssl_methods
from self_supervised.data import tensor_dls
from self_supervised.vision.simclr import SimCLR
from self_supervised.recipes import Recipe, get_recipe, recipes, register_recipe, setting_info

imagenet = 1_281_167

# name: crops, areas, learning rate (start, base, final), warm-up epochs, queue, its epoch, steps with fixed prototypes, batch, epochs, top-1
official = {
    'swav_100ep':        ('2x224+6x96', '.14-1 .05-.14', (.3,4.8,.0048), 10, None, None, 313,  4096, 100, 72.1),
    'swav_200ep':        ('2x224+6x96', '.14-1 .05-.14', (.3,4.8,.0048), 10, None, None, 313,  4096, 200, 73.9),
    'swav_400ep':        ('2x224+6x96', '.14-1 .05-.14', (.3,4.8,.0048), 10, None, None, 313,  4096, 400, 74.6),
    'swav_800ep':        ('2x224+6x96', '.14-1 .05-.14', (.3,4.8,.0048), 10, None, None, 313,  4096, 800, 75.3),
    'swav_200ep_bs256':  ('2x224+6x96', '.14-1 .05-.14', (.6,.6,.0006),  0,  3840, 15,   5005, 256,  200, 72.7),
    'swav_400ep_bs256':  ('2x224+6x96', '.14-1 .05-.14', (.6,.6,.0006),  0,  3840, 15,   5005, 256,  400, 74.3),
    'swav_400ep_2x224':  ('2x224',      '.08-1',         (.3,4.8,.0048), 10, None, None, 313,  4096, 400, 70.1),
    'swav_RN50w2_400ep': ('2x224+4x96', '.14-1 .05-.14', (.3,4.8,.0048), 10, None, None, 313,  4096, 400, 77.3),
    'swav_RN50w4_400ep': ('2x224+4x96', '.08-1 .08-.14', (.3,4.8,.0048), 10, 2560, 0,    313,  2560, 400, 77.9),
    'swav_RN50w5_400ep': ('2x224+4x96', '.14-1 .05-.14', (.1875,4.8,0.), 10, 1536, 0,    313,  1536, 400, 78.5),
}

@pytest.mark.parametrize('name', official)
def test_official_swav(name):
    crops,areas,lrs,warmup,K,start,steps,bs,epochs,top1 = official[name]
    r = get_recipe(name)
    s = r.settings
    assert [f'{n}x{o}' for n,o in zip(s['num_crops'], s['crop_sizes'])]==crops.split('+')
    assert list(zip(s['min_scales'], s['max_scales']))==[tuple(map(float, o.split('-'))) for o in areas.split()]
    assert (r.lr_start,r.lr,r.lr_final,r.warmup_epochs,r.bs,r.epochs,s['K'])==(*lrs,warmup,bs,epochs,K)
    if K: assert r.queue_start_epoch==start
    assert round(r.freeze_epochs*imagenet/bs)==steps
    assert f'{top1} %' in r.about
    common = dict(temp=.1, eps=.05, n_sinkh_iter=3, n_protos=3000, projection_size=128, jitter_s=1., jitter_p=.8, bw_p=.2, blur_p=.5, blur_s=(.1,2.))
    assert common.items()<=s.items()
    assert s['hidden_size']==(10240 if 'RN50w5' in name else 8192 if 'RN50w' in name else 2048) and s['arch']==('resnet50'+name[9:11] if 'RN50w' in name else 'resnet50')
    assert (r.opt,r.wd,r.mom,r.wd_bn_bias,r.precision,r.pool_type)==('larc',1e-6,.9,True,'auto','avg')
    assert s['stats']==([.485,.456,.406],[.228,.224,.225]) and s['fastai_init'] is False # as in multicropdataset.py; nn.Linear as PyTorch draws it

# name: crops, areas, epochs, top-1; from the scripts of DeepCluster-v2 and the table of released weights
clusters = {'deepclusterv2_400ep':       ('2x160+4x96', '.08-1 .05-.14', 400, 74.3), 'deepclusterv2_400ep_2x224': ('2x224', '.08-1', 400, 70.2),
            'deepclusterv2_800ep':       ('2x224+6x96', '.14-1 .05-.14', 800, 75.2), 'selav2_400ep': ('2x160+4x96', '.08-1 .05-.14', 400, 71.8),
            'selav2_400ep_2x224':        ('2x224', '.08-1', 400, 67.2)}

@pytest.mark.parametrize('name', clusters)
def test_official_clusters(name):
    crops,areas,epochs,top1 = clusters[name]
    r,like = get_recipe(name),get_recipe('swav_400ep').settings
    s = r.settings
    assert r.method==name.partition('v2')[0] and [f'{n}x{o}' for n,o in zip(s['num_crops'], s['crop_sizes'])]==crops.split('+')
    assert list(zip(s['min_scales'], s['max_scales']))==[tuple(map(float, o.split('-'))) for o in areas.split()]
    assert (r.epochs,s['n_heads'],s['n_protos'],s['temp'])==(epochs,3,3000,.1) and f'{top1} %' in r.about
    same = 'fastai_init stats arch bs opt lr lr_start lr_final warmup_epochs mom wd wd_bn_bias precision hidden_size projection_size jitter_s jitter_p bw_p blur_p blur_s crop_assgn_ids'.split()
    assert {k:s[k] for k in same}=={k:like[k] for k in same} # otherwise SwAV's optimiser, schedule and colours
    assert not {'K','n_sinkh_iter','eps','queue_start_epoch'} & {k for k,v in s.items() if v is not None}
    assert s.get('freeze_epochs')==(1. if r.method=='sela' else None)

@pytest.fixture
def register(monkeypatch):
    "Register the method 'mine', like SimCLR but for what is given; it is taken away again afterwards"
    for m,nm in ((method_module,'_methods'), (recipe_module,'_recipes')): monkeypatch.setattr(m, nm, dict(getattr(m, nm)))
    def _register(callback, recipes=None, **kwargs): return register_method(**(ssl_methods()['simclr']._asdict() | dict(name='mine', callback=callback, recipes=recipes, weights=None) | kwargs))
    return _register

def test_recipes_of_a_method_that_comes_later(register):
    "A method of the user's brings its own, some of them like others of its own, whatever their order"
    class Mine(SimCLR):
        def __init__(self, aug_pipelines, temp=.5, depth=3, print_augs=False): super().__init__(aug_pipelines, temp, print_augs)
    names = 'mine_large','mine_small','mine_own'
    register(Mine, dict(mine_large=dict(like='mine_small', bs=512, epochs=30), mine_small=dict(like='simclr_small', about='Mine.', depth=4), mine_own=dict(size=32, lr=.1)))
    assert set(recipes())>={*names}
    b,a,c = map(get_recipe, names)
    assert (a.method,a.about,a.settings['depth'],a.epochs,a.settings['size'])==('mine','Mine.',4,get_recipe('simclr_small').epochs,28)
    assert (b.bs,b.settings['depth'],c.lr,c.settings['size'])==(512,4,.1,32)

class Clashing(SimCLR):
    "Arguments called like settings of training"
    epoch_settings = dict(warmup_epochs=('warmup', True, 'epochs until its teacher is warm'), hold_epochs=('hold', False, 'epochs to hold'))
    def __init__(self, aug_pipelines, temp=.5, mom=.99, wd=.04, lr_final:float=1., nlayers=2, warmup=0., hold=0, print_augs=False):
        super().__init__(aug_pipelines, temp, print_augs)
        self.mom,self.wd,self.lr_final,self.nlayers,self.warmup,self.hold = mom,wd,lr_final,nlayers,warmup,hold

def clashing_views(size, bs=2, opt='none', **kwargs):
    clashing_views.got = bs,opt
    return ssl_methods()['simclr'].get_aug_pipelines(size, **kwargs)

def test_settings_by_owner(register):
    "The recipe keeps the plain name of its own settings; the method's of that name have their owner before them, in Python, in print and as flags"
    register(Clashing, dict(mine_small={'like':'simclr_small', 'wd':.3, 'callback.wd':.5, 'views.bs':7, 'callback.warmup_epochs':3.}), get_aug_pipelines=clashing_views)
    r = get_recipe('mine_small', mom=.8, **{'callback.mom':.7}, nlayers=3, hold_epochs=1.)
    cb,learn = r.create_callback(),r.learner(tensor_dls(images(32, size=28), bs=16))
    assert (r.mom,r.wd,r.warmup_epochs)==(.8,.3,1.) and (cb.mom,cb.wd,cb.lr_final)==(.7,.5,1.) and clashing_views.got==(7,'none')
    assert learn.opt_func.keywords==dict(mom=.8, wd=.3) and learn.wd==.3
    assert cb.nlayers==3 and sum(isinstance(o, nn.Linear) for o in learn.model.projector)==3 # a word that both have means one thing
    assert {'callback.mom','callback.wd','callback.lr_final','views.opt','nlayers','hold_epochs','callback.warmup_epochs'}<=set(r.names)
    assert not {'model.nlayers','callback.nlayers','callback.temp','views.size'} & set(r.names)
    assert r.new(bs=256).settings['callback.mom']==.7 and 'callback.mom=0.7' in repr(r) and all(f', {k}' in repr(r).splitlines()[0] for k in ('callback.mom','nlayers','hold_epochs'))
    with pytest.raises(ValueError, match='did you mean callback.mom'): r.new(**{'callback.mon':.7})
    with pytest.raises(ValueError, match='callback.mom is no setting of a simclr recipe'): get_recipe('simclr_small', **{'callback.mom':.7})
    r.new(bs=16, epochs=4, warmup_epochs=1., **{'callback.warmup_epochs':3.})._settle(learn, 16, [])
    assert (learn.cbs[-1].warmup,learn.cbs[-1].hold)==(.75,2)

    info = setting_info()
    assert info['lr_final'].docment=='learning rate at the end, for `bs`' and info['callback.lr_final'].default==1. and info['callback.warmup_epochs'].docment=='epochs until its teacher is warm'
    args = parse(ssl_pretrain.__wrapped__, 'photos --recipe mine_small --callback.lr-final .5 --lr-final .1 --callback.warmup-epochs none --hold-epochs 2'.split())
    assert (args['callback.lr_final'],args['lr_final'],args['callback.warmup_epochs'],args['hold_epochs'])==(.5,.1,None,2.)
    assert get_recipe(args['recipe'], **{k:args[k] for k in ('callback.lr_final','lr_final')}).create_callback().lr_final==.5

def test_settings_in_epochs_belong_to_their_method():
    r = get_recipe('swav_small')
    assert (r.freeze_epochs,r.queue_start_epoch)==(.5,None) and [k for k,v in get_recipe('swav_200ep_bs256').settings.items() if 'epoch' in k]==['epochs','warmup_epochs','freeze_epochs','queue_start_epoch']
    assert not {'freeze_epochs','queue_start_epoch'} & set(get_recipe('simclr_small').settings) and 'queue_start_epoch' not in get_recipe('sela_small').names
    assert get_recipe('simclr_small', freeze_epochs=None, queue_start_epoch=None).settings==get_recipe('simclr_small').settings # so the settings.json of older runs say
    assert repr(r).splitlines()[2].endswith('freeze_epochs=0.5')

def test_fit_counts_steps_of_the_optimizer():
    "With gradients accumulated over two batches, given to the Learner or to the fit"
    r = get_recipe('swav_small', **tiny, n_protos=10, num_crops=(2,1), crop_sizes=(12,8), freeze_epochs=1.)
    for cbs,fit_cbs in (([GradientAccumulation(16)],[]), ([],[GradientAccumulation(16)])):
        learn = r.learner(tensor_dls(images(40), bs=8), encoder(), cbs=[spy:=Spy(), *cbs])
        with learn.no_bar(), learn.no_logging(): r.fit(learn, cbs=fit_cbs)
        assert learn.swav.freeze_prototypes_niters==round(40/16)==2 and learn.swav.steps_done==10
        assert sum(spy.moved)==8

def test_sizes_are_those_of_the_pipelines(register):
    def views(width=16, **kwargs): return ssl_methods()['swav'].get_aug_pipelines((1,2), ((width,20),8), **kwargs)
    register(SimCLR, get_aug_pipelines=views)
    assert Recipe('x', 'mine', width=24).view_sizes==[(24,20),(8,8),(8,8)]
    assert get_recipe('swav_400ep_2x224').view_sizes==[(224,224)]*2 and Recipe('x', 'deepcluster').view_sizes==[(160,160)]*2+[(96,96)]*4

def test_suggest_asks_the_method(register, capsys):
    "What belongs to a method it says itself, and a builder need not have what others have"
    class Mine(SimCLR):
        @classmethod
        def suggest(cls, recipe, n_images): return [(f'{n_images} images', dict(temp=recipe.bs/1000)), ('no news', dict(temp=recipe.bs/1000))]
    def views(crop_sizes=((64,48),32)): return ssl_methods()['swav'].get_aug_pipelines((1,1), crop_sizes, blur=False)
    register(Mine, get_aug_pipelines=views)
    r = Recipe('x', 'mine', opt='adam', arch='resnet18').suggest(2000, 32)
    assert r.args==dict(crop_sizes=((43,32),21), temp=.064)
    assert capsys.readouterr().out.splitlines()[-1].startswith('temp=0.064  – 2000 images') and r.low_resolution

def test_settings_that_a_method_does_not_have():
    for nm,kw in (('simclr_small',dict(freeze_epochs=1.)), ('deepcluster_small',dict(freeze_epochs=1.)), ('sela_small',dict(queue_start_epoch=2.)), ('deepcluster_small',dict(K=10))):
        with pytest.raises(ValueError, match=f'{next(iter(kw))} is no setting of a'): get_recipe(nm, **kw)

def test_suggest_for_methods_that_assign_all_images(capsys):
    "Their number of prototypes has nothing to do with the batch"
    kw = dict(n_images=100_000, memory=8)
    for nm in ('deepclusterv2_400ep','selav2_400ep'):
        r = get_recipe(nm).suggest(**kw)
        assert r.settings['n_protos']==round(3000*(1e5/imagenet)**.61, -1)>2*r.bs and 'sample of an assignment' not in capsys.readouterr().out

def test_simclr_papers():
    one,two = get_recipe('simclr_v1_1000ep'),get_recipe('simclr_v2_800ep')
    assert one.lr==pytest.approx(.3*4096/256) and two.lr==pytest.approx(.1*math.sqrt(4096))
    assert (one.wd,two.wd,one.epochs,two.epochs,two.warmup_epochs)==(1e-6,1e-4,1000,800,.05*800)
    assert two.settings['nlayers']==3 and {one.opt,two.opt}=={'lars'} and not one.wd_bn_bias
    assert get_recipe('simclr_cifar10').lr==pytest.approx(1.*512/256)

papers = 'simclr_v1_100ep simclr_v1_1000ep simclr_v2_800ep simclr_cifar10'.split()

@pytest.mark.parametrize('name', papers)
def test_head_of_the_simclr_papers(name):
    "projection_head of the official model_util.py: every layer linear without bias and batch norm, the last without shift and ReLU"
    r = get_recipe(name, hidden_size=16, projection_size=8)
    head = r.create_model(encoder(3)).projector
    depth = r.settings.get('nlayers', 2)
    assert [type(o) for o in head]==[nn.Linear,nn.BatchNorm1d,nn.ReLU]*(depth-1)+[nn.Linear,nn.BatchNorm1d]
    assert [n for n,p in head.named_parameters() if n.endswith('bias') and p.requires_grad]==[f'{3*i+1}.bias' for i in range(depth-1)]
    assert not head[-1].bias.any()

def test_small_recipes_are_as_they_were():
    "Their head has no batch norm at its end, biases and fastai's initial weights; their results were measured so"
    for nm in recipes():
        s = get_recipe(nm).settings
        if 'simclr' in nm: assert bool(s.get('last_bn'))==(nm in papers)
        if nm.endswith('_small'): assert not {'last_bn','fastai_init','stats'} & set(s)
    enc = encoder()
    set_seed(0); a = get_recipe('swav_small').create_model(enc).projector
    set_seed(0); b = nn.Sequential(nn.Linear(8,512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512,128)); apply_init(b)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters(), strict=True))

@pytest.mark.parametrize('name', ['swav_100ep', papers[0]])
def test_projectors_of_the_official_runs_begin_as_pytorchs(name):
    "Weights uniform in ±1/√n, where fastai's are normal with √(2/n): nearly 2.5 times as wide"
    w = get_recipe(name).create_model(encoder(3)).projector[0].weight
    assert w.abs().max()<=8**-.5 and abs(w.std()*(3*8)**.5-1)<.02

def test_statistics_of_photographs_are_not_for_other_channels():
    def stats(r, n_in): return [o.std.flatten().tolist() for o in r.create_callback(n_in).aug_pipelines[0].fs if hasattr(o, 'std')]
    r,own = get_recipe('swav_100ep'),([.5],[.25])
    assert stats(r, 3)==[pytest.approx([.228,.224,.225])] and stats(r, 1)==stats(r, 13)==stats(get_recipe('swav_small'), 1)==[]
    for o in (r, r.new(bs=8), Recipe(**dict(name=r.name, method='swav')|json.loads(json.dumps(r.settings)))): assert stats(o, 1)==[] # also as a file brings it back
    assert stats(r.new(stats=own), 1)==stats(r.new(stats=own).new(bs=8), 1)==[[.25]]
    with pytest.raises(ValueError, match='stats are for 3'): r.new(stats=([.5]*3,[.2]*3)).create_callback(1).aug_pipelines[0](torch.rand(2,1,20,20)) # said by the user

@pytest.mark.parametrize('name', [o for o in recipes() if 'RN50w' not in o]) # those take gigabytes
def test_what_a_learner_gets(name):
    r   = get_recipe(name, bs=8)
    if 'teacher_weights' in r.names: r = r.new(teacher_weights=False) # nothing is fetched here
    dls = tensor_dls(torch.randint(0, 256, (16,3,32,32), dtype=torch.uint8), bs=8)
    with torch.device('meta'): enc = r.create_encoder() # too large to compute with here, and nobody does
    learn = r.learner(dls, enc)
    of     = ssl_methods()[r.method]
    cb,m,s = learn.cbs[-1],learn.model,{k:p.default for f in (of.create_model, of.get_aug_pipelines, of.callback) for k,p in inspect.signature(f).parameters.items()} | r.settings
    assert isinstance(cb, ssl_methods()[r.method].callback) and learn.wd==r.wd and learn.wd_bn_bias==r.wd_bn_bias
    n = sum(s['num_crops']) if 'num_crops' in s else s.get('n', 2)
    assert len(cb.aug_pipelines)==n and all(getattr(cb, k)==s[k] for k in ('temp','m','tps','cmom') if k in s)
    steps = {type(f).__name__:f for f in cb.aug_pipelines[0].fs}
    assert tuple(steps['RandomCropResize'].size)==(s['crop_sizes'][0] if 'crop_sizes' in s else s['size'],)*2
    assert any('Normalize' in o for o in steps) and any('Blur' in o for o in steps)==s.get('blur', True)
    linear = [o for o in m.projector.modules() if type(o) is nn.Linear]
    assert linear[0].out_features==s['hidden_size'] and linear[-1].out_features in (s['projection_size'], 2048) and len(linear)==s['nlayers'] # 2048: of the teacher, whose features are matched
    if isinstance(m.projector, nn.Sequential): assert isinstance(m.projector[1], nn.BatchNorm1d)==s['bn']
    if r.method=='swav': assert (m.prototypes.out_features,cb.K,cb.crop_assgn_ids)==(s['n_protos'],s['K'],[0,1])

tiny = dict(bs=8, epochs=4, warmup_epochs=1., hidden_size=16, projection_size=8)

class Spy(Callback):
    "What happened at every step"
    def __init__(self): self.lrs,self.moved,self.queued = [],[],[]
    def before_step(self): self.old = {n:p.detach().clone() for n,p in self.model.named_parameters()}
    def after_step(self):
        self.lrs.append(self.opt.hypers[0]['lr'])
        self.moved.append('prototypes.weight' in self.old and not torch.equal(self.old['prototypes.weight'], self.model.prototypes.weight))

def test_fit_converts_epochs_to_steps():
    r   = get_recipe('swav_200ep_bs256', **tiny, n_protos=10, num_crops=(2,1), crop_sizes=(12,8), K=16, freeze_epochs=1.5, queue_start_epoch=2, mom=.8, lr_start=.1, lr=.6, lr_final=.0006)
    spy = Spy()
    learn = r.learner(tensor_dls(images(40), bs=8), encoder(), cbs=[spy])
    quiet_fit(r, learn)
    assert learn.swav.queue_start_pct==.5 and learn.swav.freeze_prototypes_niters==round(1.5*5)
    assert spy.moved==[False]*8+[True]*12
    want = [.1+.5*i/5 for i in range(5)] + [.0006+.5*(.6-.0006)*(1+math.cos(math.pi*t/15)) for t in range(15)]
    assert spy.lrs==pytest.approx(want, rel=1e-9)
    assert learn.opt.hypers[0]['wd']==1e-6 and learn.opt.hypers[0]['mom']==.8

def quiet_fit(r, learn):
    with learn.no_bar(), learn.no_logging(): r.fit(learn)

def test_learning_rate_follows_the_batch():
    r = get_recipe('swav_100ep')
    half,adam = r.new(bs=2048),get_recipe('swav_small')
    assert (half.lr,half.lr_start,half.lr_final)==pytest.approx((2.4,.15,.0024))
    assert adam.new(bs=4*adam.bs).lr==pytest.approx(2*adam.lr)
    assert r.new(bs=2048, lr=1.).lr==1. and r.new(epochs=200).lr==4.8
    assert r.new(bs=2048).new(bs=4096).lr_final==pytest.approx(r.lr_final)
    learn = get_recipe('simclr_small', **tiny|dict(bs=16)).learner(tensor_dls(images(40), bs=8), encoder())
    with pytest.warns(UserWarning, match='batches of 8 images instead of the 16'): quiet_fit(get_recipe('simclr_small', **tiny|dict(bs=16)), learn)
    assert max(learn.recorder.lrs)==pytest.approx(get_recipe('simclr_small', **tiny|dict(bs=16)).lr/math.sqrt(2))

def test_encoder_of_the_recipe_takes_the_channels_of_the_images():
    r,dls = get_recipe('simclr_small', bs=8),tensor_dls(images(16, c=1, size=28), bs=8)
    set_seed(3)
    learn = r.learner(dls)
    set_seed(3)
    for a,b in zip(learn.model.encoder.parameters(), r.create_encoder(1).parameters(), strict=True): assert torch.equal(a, b) # a look at the images draws nothing
    assert not any('Normalize' in f.name for f in learn.cbs[-1].aug_pipelines[0].fs)
    assert get_recipe('simclr_small', stats=([.5],[.2])).create_callback(1).aug_pipelines[0].fs[-1].mean.flatten().tolist()==[.5]

def heads(enc): return [o.num_heads for o in enc.modules() if type(o).__name__=='Attention']

def test_heads_of_a_vision_transformer():
    "MoCo v3's ViT-S has 12, where timm's of the same shapes has 6; they are a setting as any other, and not passed to networks that have none"
    r = get_recipe('moco_v3_vits_300ep')
    with torch.device('meta'): assert [heads(o.create_encoder()) for o in (r, r.new(num_heads=None), r.new(num_heads=3))]==[[12]*12, [6]*12, [3]*12]
    assert any(re.match('  encoder .*num_heads=12', o) for o in repr(r).splitlines()) and 'num_heads' not in repr(get_recipe('dino_vits16_300ep')) and [o for o in recipes() if get_recipe(o).num_heads]==['moco_v3_vits_300ep']
    assert parse(ssl_pretrain.__wrapped__, 'photos --recipe x --num-heads 12'.split())['num_heads']==12 and parse(ssl_pretrain.__wrapped__, 'photos --recipe x --num-heads none'.split())['num_heads'] is None
    enc,plain = get_recipe('swav_small', arch='test_vit', low_resolution=False, num_heads=4).create_encoder(),timm.create_model('test_vit', num_classes=0, global_pool='avg', num_heads=4)
    plain.load_state_dict(enc.state_dict())
    x = torch.rand(2,3,160,160)
    assert torch.equal(enc.eval()(x), plain.eval()(x))

@pytest.mark.parametrize('arch,n,says', [('resnet18', 4, 'unexpected keyword.*num_heads'), ('xresnet18', 4, 'num_heads'), ('test_resnet', 4, 'num_heads'), ('test_vit', 3, 'divisible'), ('swin_tiny_patch4_window7_224', 3, 'subscriptable')])
def test_heads_that_do_not_fit(arch, n, says):
    r = get_recipe('swav_small', arch=arch, low_resolution=False, pool_type='catavgmax', num_heads=n)
    with pytest.raises(ValueError, match=rf'^num_heads={n} does not fit {arch} \(.*{says}.*\): num_heads=None keeps what the architecture has; other numbers are for vision transformers'): r.create_encoder()
    with torch.device('meta'): r.new(num_heads=None).create_encoder()
    with pytest.raises(TypeError, match='patchsize'): get_recipe('swav_small', arch='test_vit', low_resolution=False, num_heads=4).create_encoder(patchsize=8) # the heads are not to blame

def test_weights_that_need_other_heads(monkeypatch, tmp_path):
    "are refused, as whoever goes on with the run builds the encoder of the recipe"
    moco,vit = ssl_methods()['moco'],timm.create_model('test_vit', num_classes=0, num_heads=4)
    monkeypatch.setitem(method_module._methods, 'moco', moco._replace(weights=dict(tiny_vit=method_module.OfficialWeights('test_vit', 'MoCo v3', 1, 8, '2×224', 1., 'file:///nowhere/tiny.pth', 'base_encoder.', 'head.', dict(num_heads=4)))))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    file = tmp_path/'checkpoints'/'tiny.pth'
    torch.save({f'module.base_encoder.{k}':v for k,v in vit.state_dict().items()} | {'module.base_encoder.head.0.weight':torch.ones(2,2)}, file)
    r = get_recipe('moco_v3_vits_300ep', arch='test_vit', num_heads=4)
    x = torch.rand(2,3,160,160)
    for w in ('tiny_vit', file, str(file)):
        for enc in (r.create_encoder(pretrained=w), r.new(num_heads=None).create_encoder(pretrained=w, num_heads=4)): assert heads(enc)==[4]*6 and torch.equal(enc.eval()(x), vit.eval()(x))
        with pytest.raises(ValueError, match=rf'{re.escape(str(w))} needs an encoder with num_heads=4, that of {r.name} has num_heads=2, .*Build it with num_heads=4, a setting of the recipe'): r.new(num_heads=None).create_encoder(pretrained=w)
        with pytest.raises(ValueError, match='needs an encoder with num_heads=4, this VisionTransformer has num_heads=8'): r.new(num_heads=8).create_encoder(pretrained=w)

def test_loader_of_pytorch():
    r  = get_recipe('swav_small', **tiny, n_protos=10, arch='test_resnet')
    dl = DataLoader(TensorDataset(torch.rand(24, 1, 28, 28)), batch_size=8, shuffle=True)
    learn = r.learner(DataLoaders(dl, []))
    quiet_fit(r, learn)
    assert learn.swav.freeze_prototypes_niters==round(.5*3) and len(learn.recorder.lrs)==4*3

def test_half_precision_only_on_a_gpu():
    learn = get_recipe('swav_100ep', **tiny).learner(tensor_dls(images(16), bs=8, device='cpu'), encoder())
    assert not any(type(o).__name__=='MixedPrecision' for o in learn.cbs)

@pytest.mark.parametrize('given,new,want', [('auto',True,'bf16'), ('auto',False,'fp16'), ('fp16',True,'fp16'), ('bf16',False,'bf16'), ('fp32',True,None)])
def test_precision_of_a_gpu(monkeypatch, given, new, want):
    "bf16 where the card computes in it, not where it is imitated; what was asked for comes first; and weights lie as the views do. The GPU is pretended"
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: new or including_emulation)
    dls = tensor_dls(images(16), bs=8, device='cpu')
    def two(): return nn.Sequential(nn.Conv2d(1,4,3), nn.Conv2d(4,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    r   = get_recipe('swav_100ep', **tiny, precision=given)
    cpu = r.learner(dls, two())
    dls.device = torch.device('cuda')
    learn = r.learner(dls, two())
    modes = [o.amp_mode.value for o in learn.cbs if type(o).__name__=='MixedPrecision']
    assert modes==([want] if want else []) and r.precision_on('cuda:0')==(want or 'fp32') and r.precision_on('cpu')=='fp32'
    convs = [[m.weight for m in o.model.modules() if isinstance(m, nn.Conv2d)] for o in (learn, cpu)]
    assert len(convs[0])==2 and not convs[0][1].is_contiguous() and all(o.is_contiguous(memory_format=torch.channels_last) for o in convs[0])
    assert all(o.is_contiguous() for o in convs[1]) and not any(type(o).__name__=='MixedPrecision' for o in cpu.cbs)

def test_suggest_follows_its_rules(capsys):
    s = get_recipe('swav_200ep').suggest(1_281_167, 256, gpus=64)
    assert s.settings=={**get_recipe('swav_200ep').settings} and capsys.readouterr().out==''
    small = get_recipe('swav_200ep').suggest(5_000, 28)
    assert max(small.args['crop_sizes'])==28 and small.bs<=5_000/20 and small.args['K'] is None and 80<=small.args['n_protos']<=130
    assert small.low_resolution and small.args['blur'] is False and small.args['jitter_s']==.5 and small.bs==128
    assert (small.opt,small.lr,small.wd,small.wd_bn_bias)==('adam',get_recipe('swav_small').lr,.01,False)
    assert get_recipe('swav_200ep_bs256', bs=32).suggest(10**6).lr==pytest.approx(get_recipe('swav_small').lr/2) and s.suggest(10**6).opt=='larc'
    out = capsys.readouterr().out
    for k in ('crop_sizes','bs','n_protos','low_resolution'): assert f'{k}=' in out
    queue = get_recipe('swav_200ep_bs256').suggest(500_000)
    assert queue.args['K']==3840 and queue.queue_start_epoch==15
    few = get_recipe('swav_400ep_bs256').suggest(10_000)
    assert few.args['K'] is None and few.args['n_protos']==160 # 3000·(10,000/1.28 M)^.61, to the ten
    assert get_recipe('swav_400ep_bs256', bs=8).suggest(2_000).args['n_protos']==16 # two for each sample

def test_suggest_fits_into_the_memory(capsys):
    r = get_recipe('simclr_cifar10')
    found = {gpus:r.suggest(50_000, 32, gpus=gpus, memory=.4) for gpus in (1,4)}
    assert found[4].bs==4*found[1].bs<r.bs
    for gpus,s in found.items():
        assert s.bs%gpus==0 and s.bs/gpus*s.activation_bytes()/2 < .4e9 # half precision
    assert r.suggest(50_000, 32, memory=4).bs >= r.suggest(50_000, 32, memory=1).bs
    with pytest.raises(ValueError, match='smaller arch'): get_recipe('swav_100ep').suggest(50_000, memory=.5)

def test_activations_of_a_real_step():
    r = get_recipe('swav_small', num_crops=(2,1), hidden_size=32)
    model,kept = r.create_model(r.create_encoder(3)),{}
    own = {o.untyped_storage().data_ptr() for o in (*model.parameters(), *model.buffers())}
    def pack(t): return kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): model([torch.rand(2,3,n,n) for n in (28,28,14)])
    assert r.activation_bytes()==sum(o.nbytes() for k,o in kept.items() if k not in own)//2

@pytest.mark.parametrize('f,says', [
    (lambda: get_recipe('swav_40ep'), "'swav_40ep' is not the name of a recipe; did you mean swav_400ep"),
    (lambda: get_recipe('swav_100ep', n_prototypes=5), 'n_prototypes is no setting of a swav recipe; did you mean n_protos'),
    (lambda: get_recipe('simclr_small', K=5), 'K is no setting of a simclr recipe'),
    (lambda: Recipe('x', 'mae'), "method='mae' is not registered; there are"),
    (lambda: Recipe('x', 'swav', opt='adamw'), "opt='adamw' must be one of larc, lars, sgd, adam"),
    (lambda: Recipe('x', 'swav', precision='half'), "precision='half' must be auto, fp16, bf16 or fp32"),
    (lambda: get_recipe('swav_100ep', num_heads=0), 'num_heads=0 must be a whole number'), (lambda: get_recipe('swav_100ep', num_heads=6.), 'num_heads=6.0 must be a whole number'),
    (lambda: get_recipe('swav_100ep', lr=0), 'lr=0 must be positive'), (lambda: get_recipe('swav_100ep', lr=math.nan), 'lr=nan must be positive'),
    (lambda: get_recipe('swav_100ep', epochs=10, warmup_epochs=10), 'warmup_epochs=10 must be fewer than epochs=10'),
    (lambda: Recipe('x', 'swav', epochs=10), 'warmup_epochs=10.0 must be fewer than epochs=10: give both'),
    (lambda: get_recipe('swav_100ep').fit(Learner(tensor_dls(images(16), bs=8), encoder(), loss_func=len)), r'recipe\.learner\(dls\)'),
], ids=range(13))
def test_wrong_use(f, says):
    with pytest.raises(ValueError, match=says): f()

counts = {k:nm for nm in ('swav_100ep','simclr_v2_800ep','deepcluster_small','sela_small') for k in ('bs','epochs','hidden_size','projection_size','nlayers','n_protos','n_heads') if k in get_recipe(nm).names}

@pytest.mark.parametrize('v', [0, -1, 2.5, '8', True, math.nan], ids=repr)
@pytest.mark.parametrize('k', counts)
def test_counts_are_whole_and_positive(k, v):
    "Before an encoder is made, in one line that names the setting"
    assert len(counts)==7
    for f in (lambda: get_recipe(counts[k], **{k:v}), lambda: Recipe('x', get_recipe(counts[k]).method, **{k:v})):
        with pytest.raises(ValueError, match=rf'^{k}={re.escape(str(v))} must be a whole number, 1 or more$'): f()

def test_counts_of_each_layer():
    "A number for each; and numbers of NumPy are numbers"
    assert get_recipe('swav_small', hidden_size=(64,32), nlayers=3, bs=np.int64(64), n_protos=np.int32(8)).bs==64
    with pytest.raises(ValueError, match=r'hidden_size=\(64, 0\) must be'): get_recipe('swav_small', hidden_size=(64,0), nlayers=3)

def shorter(f):
    "A recipe, and what was said"
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); r = f()
    return r,[str(o.message) for o in w if 'in proportion' in str(o.message)]

@pytest.mark.parametrize('name', recipes())
def test_one_epoch_of_every_recipe(name):
    "What ended before the training does so still, at the same part of it; the rest is as it was"
    full      = get_recipe(name)
    r,words   = shorter(lambda: get_recipe(name, epochs=1))
    in_epochs = {k:v for k,v in full.settings.items() if k.endswith(('_epochs','_epoch')) and v is not None}
    for k,v in in_epochs.items(): assert getattr(r, k)==pytest.approx(v/full.epochs if 1<=v<full.epochs else v) and getattr(r, k)<1
    cut = [k for k,v in in_epochs.items() if v>=1]
    assert len(words)==bool(cut) and all(f'{k}={in_epochs[k]:g} → ' in words[0] for k in cut)
    assert {k:v for k,v in r.settings.items() if k not in ('epochs',*cut)}=={k:v for k,v in full.settings.items() if k not in ('epochs',*cut)}

def test_what_still_fits_or_is_given_is_kept():
    (r,words),(own,none) = shorter(lambda: get_recipe('swav_200ep_bs256', epochs=20)),shorter(lambda: get_recipe('swav_100ep', epochs=4, warmup_epochs=2., freeze_epochs=9., queue_start_epoch=None))
    assert (r.queue_start_epoch,r.freeze_epochs)==(15,1.) and not words and (own.warmup_epochs,own.freeze_epochs)==(2.,9.) and not none
    assert shorter(lambda: get_recipe('swav_100ep', epochs=11))[0].warmup_epochs==10 and shorter(lambda: get_recipe('swav_100ep', epochs=10))[0].warmup_epochs==1.
    always = Recipe('x', 'swav', epochs=20, freeze_epochs=30.).new(epochs=12) # frozen to the end, and so it stays
    assert always.freeze_epochs==30.

def test_one_epoch_runs():
    "With a warm-up of a tenth of its steps, as in the recipe"
    r,_ = shorter(lambda: get_recipe('swav_100ep', epochs=1, bs=4, hidden_size=16, projection_size=8, n_protos=10, num_crops=(2,1), crop_sizes=(12,8)))
    learn = r.learner(tensor_dls(images(40), bs=4), encoder(), cbs=[spy:=Spy()])
    quiet_fit(r, learn)
    assert len(spy.lrs)==10 and spy.lrs[0]==pytest.approx(r.lr_start) and max(spy.lrs)==spy.lrs[1]==pytest.approx(r.lr) and r.warmup_epochs==pytest.approx(.1)

def test_fewer_kinds_of_crops(register):
    "Values of the recipe for a kind that is gone go too; those that are given stay, to be refused"
    four = 'num_crops','crop_sizes','min_scales','max_scales'
    register(SimCLR, dict(mine_small=dict(like='simclr_small', num_crops=(2,4), crop_sizes=(28,14), min_scales=(.4,.1), max_scales=(1.,.4))),
             get_aug_pipelines=crop_kinds(*four)(ssl_methods()['swav'].get_aug_pipelines))
    r = get_recipe('mine_small', num_crops=(2,))
    assert r.view_sizes==[(28,28)]*2 and [r.args[k] for k in four]==[(2,),(28,),(.4,),(1.,)]
    assert get_recipe('mine_small', num_crops=[3], crop_sizes=(20,)).view_sizes==[(20,20)]*3 and get_recipe('mine_small', num_crops=(1,2)).args['min_scales']==(.4,.1)
    with pytest.raises(ValueError, match='give all four the same length'): get_recipe('mine_small', num_crops=(2,), crop_sizes=(28,14)).view_sizes
    with pytest.raises(ValueError, match='give all four the same length'): get_recipe('mine_small', num_crops=(2,2,2)).view_sizes

def test_every_setting_has_help():
    info = setting_info()
    assert {k for o in recipes() for k in get_recipe(o).settings}<=set(info)
    assert {k:v.docment for k,v in info.items() if not v.docment}=={}
    assert not set(info) & {'self','name','encoder','aug_pipelines','kwargs','return'}

def test_text_has_every_setting():
    r = get_recipe('swav_400ep_bs256')
    text = repr(r)
    for k,v in r.settings.items():
        if v is not None: assert re.search(rf'\b{k}=', text), k
    assert text.startswith('swav_400ep_bs256 (swav). Official run') # and no longer when something is changed
    assert repr(r.new(temp=.2, hard_codes=True)).startswith('swav_400ep_bs256 (swav, but for temp, hard_codes). ')

def test_own_recipe():
    r = register_recipe(get_recipe('swav_small').new(name='mine', about='Mine.'))
    try: assert get_recipe('mine', epochs=3).epochs==3 and get_recipe('mine') is not r and 'mine' in recipes()
    finally:
        from self_supervised import recipes as module
        module._recipes.pop('mine')

def test_fit_passes_callbacks_on():
    seen = []
    r = get_recipe('simclr_small', **tiny)
    learn = r.learner(tensor_dls(images(16), bs=8), encoder())
    with learn.no_bar(), learn.no_logging(): r.fit(learn, cbs=Callback(after_epoch=lambda cb: seen.append(cb.epoch)))
    assert seen==[0,1,2,3] and not quiet(learn, 0)

class Seen(Callback):
    "The views of every batch, after they were made, in double, since rounding errors grow from step to step"
    order = 50
    def before_fit(self): self.all = []
    def before_batch(self):
        self.learn.xb = ([v.double() for v in self.xb[0]],)
        self.all.append(self.xb[0])

def official_training(model, batches, lrs, frozen, K, wd=1e-6, trust=1e-3, mom=.9, temp=.1, eps=.05):
    "The training loop of the official script as its paper describes it, for a batch on one GPU, in plain PyTorch; `model` is changed"
    ps,bufs = list(model.parameters()),{}
    queues = [torch.zeros(0, model.prototypes.in_features, dtype=torch.float64) for _ in range(2)]
    for t,(views,lr) in enumerate(zip(batches, lrs)):
        with torch.no_grad(): model.prototypes.weight /= model.prototypes.weight.norm(dim=1, keepdim=True)
        sizes = [v.shape[-1] for v in views]
        feats = torch.cat([model.encoder(torch.cat([v for v in views if v.shape[-1]==s])) for s in sorted(set(sizes), reverse=True)])
        z = model.projector(feats)
        z = z/z.norm(dim=1, keepdim=True)
        out,B,loss = z@model.prototypes.weight.T,len(views[0]),0.
        for a in (0,1):
            with torch.no_grad():
                s = out[a*B:(a+1)*B]
                if K and len(queues[a])==K: s = torch.cat([queues[a]@model.prototypes.weight.T, s])
                Q = (s/eps).exp().T
                Q = Q/Q.sum()
                for _ in range(3):
                    Q = Q/Q.sum(1, keepdim=True)/len(Q)
                    Q = Q/Q.sum(0, keepdim=True)/Q.shape[1]
                q = (Q*Q.shape[1]).T[-B:]
                queues[a] = torch.cat([z[a*B:(a+1)*B], queues[a]])[:K or 0]
            others = [v for v in range(len(views)) if v!=a]
            loss = loss - sum((q*(out[v*B:(v+1)*B]/temp).log_softmax(1)).sum(1).mean() for v in others)/len(others)/2
        grads = torch.autograd.grad(loss, ps)
        with torch.no_grad():
            for i,(p,g) in enumerate(zip(ps, grads)):
                if p is model.prototypes.weight and t<frozen: continue
                if p.norm()>0 and g.norm()>0: g = (g+wd*p)*trust*p.norm()/(g.norm()+wd*p.norm()+1e-8)
                bufs[i] = g if i not in bufs else mom*bufs[i]+g
                p -= lr*bufs[i]
    with torch.no_grad(): model.prototypes.weight /= model.prototypes.weight.norm(dim=1, keepdim=True)
    return model

@pytest.mark.parametrize('K', [None,16])
def test_trains_as_the_official_loop(K):
    "Views, model, loss, queue, frozen steps, LARC and schedule together: the weights after 20 steps"
    r = get_recipe('swav_200ep_bs256', bs=8, epochs=4, lr=5., lr_start=5., lr_final=.05, num_crops=(2,2), crop_sizes=(14,8), hidden_size=16, projection_size=8, n_protos=10,
                   K=K, queue_start_epoch=0., freeze_epochs=1.4)
    learn = r.learner(tensor_dls(images(40, c=3), bs=8), encoder(3), cbs=Seen())
    learn.remove_cb(Recorder) # which cannot average losses in float64
    learn.model.double()
    other = deepcopy(learn.model)
    quiet_fit(r, learn)
    lrs = [.05+.5*(5-.05)*(1+math.cos(math.pi*t/20)) for t in range(20)]
    official_training(other.train(), learn.seen.all, lrs, 7, K)

    for (k,a),b in zip(learn.model.named_parameters(), other.parameters(), strict=True):
        if k in ('encoder.0.bias','projector.0.bias'): continue # batch norm takes them out again: their gradient is noise, which LARC makes as long as any
        assert torch.allclose(a, b, atol=1e-8, rtol=1e-8), (k, (a-b).abs().max())
    assert len(learn.seen.all)==20
