"Contracts of `self_supervised.layers`: every encoder keeps (B,F), heads have fastai's structure, checkpointing changes nothing."
import itertools, pickle, random, warnings
from copy import deepcopy

import numpy as np, pytest, timm, torch, torchvision
from fastai.vision.all import (AdaptiveConcatPool2d, Learner, SigmoidRange, create_head, params, xresnet18, xresnet34)
from fastai.test_utils import synth_dbunch
from torch import nn

from self_supervised.layers import *

archs = {'xresnet18':1024, 'resnet18':1024, 'tf_efficientnet_b0':2560, 'convnext_atto':320, 'vit_tiny_patch16_224':192, 'mobilenetv3_small':1024}

def enc(arch, **kwargs): return create_encoder(arch, pretrained=False, **kwargs)
def imgs(n_in=3, h=32, w=None, bs=2, seed=0): return torch.randn(bs, n_in, h, w or h, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The networks here are so small that a second thread only waits"
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

# ---- the contract -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch,n_in', [*((o,1) for o in archs), ('xresnet18',3), ('resnet18',4), ('convnext_atto',3), ('vit_tiny_patch16_224',4)])
def test_encoder_contract(arch, n_in):
    m = enc(arch, n_in=n_in)
    assert encoder_channels(m) == n_in
    assert encoder_dim(m) == encoder_dim(m, 48) == encoder_dim(m, (32,64), n_in) == archs[arch]
    for x in (imgs(n_in,64), imgs(n_in,32), imgs(n_in,32,48)):
        out = m(x)
        assert out.shape == (2,archs[arch]) and out.isfinite().all()
    m(imgs(n_in,64,bs=4)).pow(2).sum().backward()
    assert [n for n,p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

@pytest.mark.parametrize('arch', archs)
def test_every_channel_matters(arch):
    m = enc(arch, n_in=4).eval()
    x = imgs(4,64)
    for c in range(4):
        y = x.clone(); y[:,c] += 1
        assert not torch.allclose(m(x), m(y), atol=1e-7)

def test_names_both_libraries_know_are_fastais():
    assert type(enc('resnet18')) is nn.Sequential and type(enc('xresnet18')[0]).__name__ == 'ConvLayer'
    assert type(create_timm_encoder('resnet18', pretrained=False)) is timm.models.resnet.ResNet
    assert type(enc('convnext_tiny')) is timm.models.convnext.ConvNeXt # torchvision has one too, fastai has no settings for it

def test_function_and_name_give_the_same():
    for f,n in ((xresnet18,'xresnet18'), (torchvision.models.resnet18,'resnet18')):
        torch.manual_seed(1); a = create_fastai_encoder(f, pretrained=False)
        torch.manual_seed(1); b = create_fastai_encoder(n, pretrained=False)
        torch.manual_seed(1); c = enc(n)
        x = imgs()
        assert torch.equal(a.eval()(x), b.eval()(x)) and torch.equal(a(x), c.eval()(x))

def test_body_is_the_model_without_its_head():
    torch.manual_seed(1); m = torchvision.models.resnet18().eval(); m.fc = nn.Identity()
    torch.manual_seed(1); e = enc('resnet18', pool_type=PoolingType.Avg).eval()
    assert torch.allclose(m(imgs(h=64)), e(imgs(h=64)), atol=1e-5)
    torch.manual_seed(1); m = timm.create_model('tf_efficientnet_b0', num_classes=0, global_pool='max').eval()
    torch.manual_seed(1); e = enc('tf_efficientnet_b0', pool_type=PoolingType.Max).eval()
    assert torch.allclose(m(imgs(h=64)), e(imgs(h=64)), atol=1e-5)

def test_any_function_that_makes_a_model():
    e = create_encoder(torchvision.models.mobilenet_v3_small, pretrained=False, n_in=2)
    assert e(imgs(2,64)).shape == (2, encoder_dim(e)) == (2,2*576)

def test_pretrained_weights_are_adapted_to_the_channels():
    "Without a network: the arch hands over a model that stands for a pretrained one."
    m = torchvision.models.resnet18()
    def arch(pretrained): return deepcopy(m)
    w = m.conv1.weight
    assert torch.equal(create_fastai_encoder(arch, n_in=3)[0].weight, w)
    assert torch.allclose(create_fastai_encoder(arch, n_in=1)[0].weight, w.sum(1, keepdim=True))
    w4 = create_fastai_encoder(arch, n_in=4)[0].weight
    assert torch.equal(w4[:,:3], w) and (w4[:,3]==0).all()

def test_pretrained_reaches_the_library(monkeypatch):
    "torchvision is asked for its default weights, timm for its own, each only if wanted."
    seen = []
    def resnet18(weights=None): seen.append(weights); return torchvision.models.resnet18()
    resnet18.__module__ = 'torchvision.models.resnet'
    for p in (True,False): create_fastai_encoder(resnet18, pretrained=p)
    make = timm.create_model
    def create_model(arch, pretrained=False, **kwargs): seen.append(pretrained); return make(arch, **kwargs)
    monkeypatch.setattr(timm, 'create_model', create_model)
    for p in (True,False): create_timm_encoder('vit_tiny_patch16_224', pretrained=p, pool_type=None)
    assert seen == ['DEFAULT',None,True,False]

# ---- names --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('old,new', [('tf_efficientnet_b0_ns','tf_efficientnet_b0'), ('mobilenetv3_small','mobilenetv3_small_100'),
                                     ('vit_deit_tiny_patch16_224','deit_tiny_patch16_224'), ('ssl_resnet18','resnet18')])
def test_retired_names(old, new):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        torch.manual_seed(1); a = create_timm_encoder(old, pretrained=False)
    torch.manual_seed(1); b = create_timm_encoder(new, pretrained=False)
    assert all(torch.equal(p,q) for p,q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_all_names_timm_retired_resolve():
    from self_supervised.encoders import _timm_name
    for old in timm.models.get_deprecated_models(): assert timm.is_model(_timm_name(old)) and _timm_name(old) != old

@pytest.mark.parametrize('make,typo,near', [(create_encoder,'resnet_18','resnet18'), (create_encoder,'vit_tiny','vit_tiny_patch16_224'),
                                            (create_timm_encoder,'efficientnet_b00','efficientnet_b0'), (create_fastai_encoder,'xresnt18','xresnet18')])
def test_typo(make, typo, near):
    with pytest.raises(ValueError, match=rf'{typo}.*did you mean.*\b{near}\b'): make(typo, pretrained=False)

def test_nonsense_name():
    with pytest.raises(ValueError, match='zzzz'): enc('zzzz')

# ---- pooling ------------------------------------------------------------------------------------------------------------------

def test_pooling_types():
    assert {k:v for k,v in vars(PoolingType).items() if k[0]!='_'} == dict(Fast='fast', Avg='avg', AvgMax='avgmax', CatAvgMax='catavgmax', Max='max')

@pytest.mark.parametrize('make,arch,kw', [(create_fastai_encoder,'xresnet18',dict(widen=.25)), (create_timm_encoder,'test_resnet',{})])
def test_pooling_does_what_its_name_says(make, arch, kw):
    def run(p):
        torch.manual_seed(1)
        return make(arch, pretrained=False, pool_type=p, **kw).eval()(imgs(h=96))
    avg,mx = run(PoolingType.Avg),run(PoolingType.Max)
    assert avg.shape == mx.shape and avg.ndim==2 and (mx>=avg).all() and (mx>avg+1e-3).any()
    for p in (PoolingType.Fast,None,False): assert torch.allclose(run(p), avg, atol=1e-6)
    assert torch.allclose(run(PoolingType.AvgMax), (avg+mx)/2, atol=1e-6)
    cat = run(PoolingType.CatAvgMax)
    assert torch.allclose(cat, torch.cat((mx,avg) if make is create_fastai_encoder else (avg,mx), 1), atol=1e-6)

@pytest.mark.parametrize('pool,layer', [(None,nn.AdaptiveAvgPool2d), ('fast',nn.AdaptiveAvgPool2d), ('avg',nn.AdaptiveAvgPool2d), ('max',nn.AdaptiveMaxPool2d),
                                        ('avgmax',timm.layers.AdaptiveAvgMaxPool2d), ('catavgmax',AdaptiveConcatPool2d)])
def test_features_of_existing_encoders_stay(pool, layer):
    "The same numbers and the same `state_dict` as from the layers that encoders of earlier versions end with"
    e = create_fastai_encoder('xresnet18', pretrained=False, pool_type=pool, widen=.25).eval()
    before = deepcopy(e); before[-2] = layer(1)
    assert list(before.state_dict()) == list(e.state_dict()) and not list(e[-2].parameters())
    for x in (imgs(h=96), imgs(h=96).to(memory_format=torch.channels_last), imgs(h=33, w=70)): assert torch.equal(e(x), before(x))

@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224','convnext_atto'])
def test_default_gives_way_to_own_pooling(arch):
    torch.manual_seed(1); a = enc(arch)
    torch.manual_seed(1); b = enc(arch, pool_type=None)
    assert {k:v.shape for k,v in a.state_dict().items()} == {k:v.shape for k,v in b.state_dict().items()}
    assert encoder_dim(a) == a.num_features
    assert encoder_dim(enc(arch, pool_type=PoolingType.AvgMax)) == a.num_features

@pytest.mark.parametrize('arch,pool', [('vit_tiny_patch16_224','fast'), ('vit_tiny_patch16_224','mean'), ('convnext_atto','fastcatavgmax'), ('tf_efficientnet_b0','mean'),
                                       ('xresnet18','mean'), ('mixer_s32_224','max')])
def test_explicit_pooling_that_does_not_fit(arch, pool):
    with pytest.raises(ValueError, match=f"pool_type='{pool}'.*None"): enc(arch, pool_type=pool)

def test_other_mistakes_are_not_taken_for_pooling():
    with pytest.raises(TypeError, match='nonsense'): enc('convnext_atto', nonsense=1)
    with pytest.raises(AssertionError): enc('vit_tiny_patch16_224', depth=1, num_heads=7) # 192 features do not divide by 7

# ---- sizes --------------------------------------------------------------------------------------------------------------------

def test_vit_takes_other_sizes_only_if_let():
    m = enc('vit_tiny_patch16_224', depth=1, dynamic_img_size=False)
    assert encoder_dim(m) == 192 # at its native size
    with pytest.raises(ValueError, match='pass the size'): encoder_dim(m, 96)
    m = enc('vit_tiny_patch16_224', depth=1)
    with pytest.raises(ValueError, match='divisible'): encoder_dim(m, 40)
    assert encoder_dim(enc('vit_tiny_patch16_224', depth=1, dynamic_img_pad=True), 40) == 192

def test_swin_small_crops():
    m = enc('swin_tiny_patch4_window7_224', depths=(1,1), num_heads=(3,6))
    assert encoder_dim(m, 64) == encoder_dim(m, 96) == 2*m.num_features

# ---- low resolution -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make,arch,gain', [(create_encoder,'xresnet18',4), (create_encoder,'resnet18',4), (create_timm_encoder,'resnet18',4), (create_timm_encoder,'resnet18d',4),
    (create_encoder,'densenet121',4), (create_encoder,'tf_efficientnet_b0',2), (create_encoder,'mobilenetv3_small_100',2)])
def test_low_resolution(make, arch, gain):
    def side(low):
        "Width of the map that is pooled"
        m,res = make(arch, pretrained=False, n_in=1, low_resolution=low).eval(),[]
        pools = [o for n,o in m.named_modules() if isinstance(o, (AdaptiveConcatPool2d, timm.layers.SelectAdaptivePool2d))]
        pools[-1].register_forward_pre_hook(lambda _,inp: res.append(inp[0].shape[-1]))
        with torch.no_grad(): assert m(imgs(1,64)).isfinite().all()
        return res[0]
    assert side(True) == gain*side(False)

def test_low_resolution_stem_of_resnet():
    torch.manual_seed(1); a = enc('resnet18')
    torch.manual_seed(1); b = enc('resnet18', low_resolution=True)
    assert (b[0].kernel_size, b[0].stride, b[0].padding) == ((3,3),(1,1),(1,1)) and isinstance(b[3], nn.Identity)
    assert torch.allclose(b[0].weight, a[0].weight[:,:,2:5,2:5]*7/3)
    fan_out = 64*9
    assert abs(b[0].weight.std()/(2/fan_out)**.5 - 1) < .1 # what kaiming_normal_(mode='fan_out') gives a 3x3 kernel
    assert b[0].weight.requires_grad and b[0].weight.is_leaf
    assert all(torch.equal(p,q) for p,q in zip(a[4].parameters(), b[4].parameters()))

@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224','convnext_atto','vgg11_bn','mixer_s32_224'])
def test_low_resolution_refused(arch):
    with torch.device('meta'), pytest.raises(ValueError, match='low_resolution=True.*stride 2.*[Rr]esnets'): enc(arch, low_resolution=True)

def test_small_patches_instead():
    with pytest.raises(ValueError, match='low_resolution=True'): enc('convnext_atto', patch_size=2, low_resolution=True)
    assert encoder_dim(enc('vit_tiny_patch16_224', depth=1, patch_size=4, img_size=32), 32) == 192
    assert encoder_dim(enc('convnext_atto', patch_size=2), 32) == 320

# ---- any module ---------------------------------------------------------------------------------------------------------------

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.drop = nn.Conv2d(2,5,3),nn.BatchNorm2d(5),nn.Dropout(.5)
    def forward(self, x): return (self.drop(self.bn(self.conv(x))) + torch.rand(1)).mean((2,3))

def test_probe_leaves_no_trace():
    m = Noisy(); m.train(); m.bn.eval()
    m.conv.weight.grad = torch.ones_like(m.conv.weight)
    before,rng,py,npr = deepcopy(m.state_dict()),torch.get_rng_state(),random.getstate(),np.random.get_state()[1].copy()
    assert encoder_dim(m) == encoder_dim(m, (9,30)) == 5
    assert m.training and m.conv.training and m.drop.training and not m.bn.training
    m.bn.train(); encoder_dim(m)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate()==py and (np.random.get_state()[1]==npr).all()
    assert (m.conv.weight.grad==1).all()
    m.bn.eval()
    with pytest.raises(ValueError): encoder_dim(m, 2) # smaller than the kernel
    assert m.training and not m.bn.training and torch.equal(torch.get_rng_state(), rng)

def test_plain_modules():
    m = Noisy()
    assert create_encoder(m) is m and create_encoder(m, pretrained=False, n_in=2) is m and create_encoder(nn.Flatten(), n_in=7) and encoder_channels(m) == 2
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 11))
    assert encoder_dim(mlp, 8, 3) == 11
    assert encoder_dim(mlp.double(), 8, 3) == 11
    assert encoder_dim(nn.Flatten(), (2,3), 4) == 24 # no parameters at all

@pytest.mark.parametrize('m,kw,msg', [
    (nn.Conv2d(3,4,3),                          {},                 r'\(2, 4, 62, 62\).*pooling and flattening'),
    (nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten(0,2)), {},          r'\(496, 62\).*pooling and flattening'),
    (nn.Identity(),                             dict(n_in=3),       'pooling and flattening'),
    (nn.Flatten(),                              {},                 'no convolution.*pass n_in'),
    (nn.Sequential(nn.Flatten(), nn.Linear(9,2)), dict(n_in=3),     'pass the size and n_in'),
    (nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten()), dict(n_in=1),   'pass the size and n_in')])
def test_what_is_no_encoder(m, kw, msg):
    with pytest.raises(ValueError, match=msg): encoder_dim(m, **kw)

def test_wrong_arguments():
    with pytest.raises(ValueError, match='low_resolution'): create_encoder(Noisy(), low_resolution=True)
    with pytest.raises(ValueError, match='drop_rate'):      create_encoder(Noisy(), drop_rate=.1)
    for kw in (dict(pretrained=True), dict(n_in=7), dict(pool_type='avg')): # what a name can be given is never dropped in silence
        with pytest.raises(ValueError, match=f'already built: change it itself instead of passing {[*kw][0]}'): create_encoder(Noisy(), **kw)
    with pytest.raises(ValueError, match='instead of passing pretrained'): create_model(Noisy(), 3, pretrained=True)
    assert create_model(Noisy(), 3, n_in=2)[1]
    for bad in (Noisy, 3, None):
        with pytest.raises(TypeError, match='already built'): create_encoder(bad)
    for make in (create_encoder, create_fastai_encoder, create_timm_encoder):
        for n in (0,-1,1.5):
            with pytest.raises(ValueError, match=f'n_in={n}'): make('resnet18', pretrained=False, n_in=n)
    for arch in ('xresnet18', xresnet34, 'xse_resnet18'):
        with pytest.raises(ValueError, match='pretrained=True.*pretrained=False'): create_encoder(arch)

# ---- projector and head -------------------------------------------------------------------------------------------------------

L1,BN,R = nn.Linear,nn.BatchNorm1d,nn.ReLU
@pytest.mark.parametrize('bn,nlayers,types,szs', [
    (False,1, [L1],                       [(6,3)]),
    (False,2, [L1,R,L1],                  [(6,5),(5,3)]),
    (True, 2, [L1,BN,R,L1],               [(6,5),(5,3)]),
    (True, 3, [L1,BN,R,L1,BN,R,L1],       [(6,5),(5,5),(5,3)])])
def test_mlp(bn, nlayers, types, szs):
    m = create_mlp_module(6, 5, 3, bn=bn, nlayers=nlayers)
    assert [type(o) for o in m] == types
    assert [(o.in_features,o.out_features) for o in m if isinstance(o, L1)] == szs
    assert all(o.bias is not None for o in m if isinstance(o, L1))
    assert m(torch.randn(4,6)).shape == (4,3)

@pytest.mark.parametrize('n', [0,-1])
def test_mlp_without_layers(n):
    with pytest.raises(ValueError, match=f'nlayers={n}'): create_mlp_module(6, 5, 3, nlayers=n)

@pytest.mark.parametrize('nlayers', [1,2,3])
def test_projector_with_batch_norm_to_its_end(nlayers):
    "Outputs have mean 0 and the length of the last layer's scale; a shift is learnt by the middle ones only, and linear layers have none"
    m = create_mlp_module(6, 5, 3, bn=True, nlayers=nlayers, last_bn=True)
    assert [type(o) for o in m]==[L1,BN,R]*(nlayers-1)+[L1,BN] and not any(o.bias is not None for o in m if isinstance(o, L1))
    assert [o.bias.requires_grad for o in m if isinstance(o, BN)]==[True]*(nlayers-1)+[False]
    opt,x = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], .01, weight_decay=.1),torch.randn(32,6)
    for _ in range(3): opt.zero_grad(); (m(x)+1).square().mean().backward(); opt.step()
    z = m(x)
    assert z.mean(0).abs().max()<1e-5 and torch.allclose(z.std(0, correction=0), m[-1].weight.abs(), atol=1e-3) and not m[-1].bias.any()
    with pytest.raises(ValueError, match='goes with bn=True'): create_mlp_module(6, 5, 3, last_bn=True)

def test_projector_of_several_widths():
    assert [o.out_features for o in create_mlp_module(6, (5,4), 3, bn=True, nlayers=3) if isinstance(o, L1)]==[5,4,3]
    with pytest.raises(ValueError, match=r'hidden_size=\(5, 4\) are 2 numbers, and nlayers=2'): create_mlp_module(6, (5,4), 3)

def test_wide_resnets_begin_as_the_official_ones():
    "All residual branches have a scale of 1 (timm's own begin at 0)"
    norms = [o for o in create_timm_encoder('resnet50w2', pretrained=False, pool_type='avg').modules() if isinstance(o, nn.BatchNorm2d)]
    assert len(norms)==53 and all((o.weight==1).all() and not o.bias.any() for o in norms)
    own = create_timm_encoder('resnet50w2', pretrained=False, pool_type='avg', zero_init_last=True)
    assert not own.layer2[1].bn3.weight.any() # for who wants it

@pytest.mark.parametrize('kw', [{}, dict(lin_ftrs=[7,8]), dict(lin_ftrs=[]), dict(ps=.2), dict(ps=0.), dict(ps=[.1,.2]), dict(first_bn=False), dict(bn_final=True),
    dict(lin_first=True), dict(lin_first=True, lin_ftrs=[7,8], ps=[.1,.2,.3]), dict(lin_first=True, lin_ftrs=[]), dict(y_range=(0,5)), dict(lin_first=True, bn_final=True, y_range=(-1,1))])
def test_cls_is_fastais_head(kw):
    kw2 = deepcopy(kw)
    m   = create_cls_module(6, 3, **kw)
    assert str(m) == str(create_head(6, 3, pool=False, **deepcopy(kw))) and kw == kw2
    assert m(torch.randn(4,6)).shape == (4,3)

def plain_head(nf, n_out, lin_ftrs=None, ps=.5, use_bn=True, first_bn=True, bn_final=False, lin_first=False, y_range=None):
    "The layers of a classifier, written out"
    szs = [nf, *([512] if lin_ftrs is None else lin_ftrs), n_out]
    n   = len(szs)-1
    ps  = list(ps) if isinstance(ps, (list,tuple)) else [ps/2]*(n-1)+[ps]
    def drop(p): return [nn.Dropout(p)] if p else []
    def bn(i, k): return [BN(k)] if (use_bn if i else first_bn) else []
    res = [nn.Dropout(ps[0])] if lin_first else []
    for i,(ni,no) in enumerate(zip(szs, szs[1:])):
        last = i==n-1
        if lin_first and last: res += [L1(ni, no)]
        elif lin_first: res += [L1(ni, no, bias=not bn(i, no)), R(inplace=True), *bn(i, no), *drop(ps[i+1])]
        else: res += [*bn(i, ni), *drop(ps[i]), L1(ni, no, bias=not bn(i, ni)), *([] if last else [R(inplace=True)])]
    return nn.Sequential(*res, *([BN(n_out, momentum=.01)] if bn_final else []), *([SigmoidRange(*y_range)] if y_range else []))

@pytest.mark.parametrize('lin_first', [False,True])
@pytest.mark.parametrize('lin_ftrs,ps', [(None,.5), ([],.3), ([],[.3]), ((7,8),.2), ([7,8],[.1,0.,.3]), ([7],0.)])
def test_cls_layers(lin_ftrs, ps, lin_first):
    "Which layers, in which order, with which dropout and bias, for every way to have batch norm"
    for use_bn,first_bn,bn_final in itertools.product([False,True], repeat=3):
        kw = dict(lin_ftrs=lin_ftrs, ps=ps, use_bn=use_bn, first_bn=first_bn, bn_final=bn_final, lin_first=lin_first, y_range=(0,1) if bn_final else None)
        args = deepcopy(kw)
        torch.manual_seed(1); m = create_cls_module(6, 3, **kw)
        torch.manual_seed(1); want = plain_head(6, 3, **kw)
        assert str(m) == str(want) and kw == args
        if use_bn: # the same random numbers too; what fastai does to its batch norms aside
            for a,b in zip(m, want, strict=True):
                if isinstance(a, L1): assert torch.equal(a.weight, b.weight)
        else: assert all(o.bias.any() and o.bias.abs().max() <= o.in_features**-.5 for o in m if isinstance(o, L1) and o.bias is not None)

def test_cls_without_batch_norm():
    m = create_cls_module(6, 3, lin_ftrs=[7,8], use_bn=False)
    assert [o.num_features for o in m if isinstance(o, BN)] == [6]
    assert not [o for o in create_cls_module(6, 3, use_bn=False, first_bn=False) if isinstance(o, BN)]
    lo,hi = 2.,5.
    out = create_cls_module(6, 3, y_range=(lo,hi)).eval()(100*torch.randn(50,6))
    assert isinstance(create_cls_module(6, 3, y_range=(lo,hi))[-1], SigmoidRange) and (out>=lo).all() and (out<=hi).all()

def test_cls_wrong_dropouts():
    with pytest.raises(ValueError, match='2 layers'): create_cls_module(6, 3, ps=[.1,.2,.3])

@pytest.mark.parametrize('arch', ['xresnet18','vit_tiny_patch16_224'])
def test_create_model(arch):
    m = create_model(arch, 5, pretrained=False, n_in=1, lin_ftrs=[9], ps=.1, bn_final=True)
    assert type(m) is nn.Sequential and len(m)==2 and m(imgs(1,32)).shape == (2,5)
    assert str(m[1]) == str(create_cls_module(archs[arch], 5, lin_ftrs=[9], ps=.1, bn_final=True))
    body,head = model_splitter(m)
    assert [id(p) for p in body] == [id(p) for p in params(m[0])] and [id(p) for p in head] == [id(p) for p in params(m[1])]

def test_create_model_from_module_and_freeze():
    e = Noisy()
    m = create_model(e, 3, n_in=2)
    assert m[0] is e and m(imgs(2,8)).shape == (2,3)
    learn = Learner(synth_dbunch(), m, splitter=model_splitter, loss_func=nn.MSELoss()); learn.freeze()
    assert not e.conv.weight.requires_grad and all(p.requires_grad for p in m[1].parameters())
    assert create_model('resnet18', 3, pretrained=False, low_resolution=True)[0][0].stride == (1,1)
    with pytest.raises(TypeError): create_model(e, 3, n_in=2, nonsense=1)

# ---- gradient checkpointing ---------------------------------------------------------------------------------------------------

ckpts = {'xresnet18': (CheckpointSequential, lambda: create_fastai_encoder('xresnet18', pretrained=False)),
         'resnet18': (CheckpointResNet, lambda: create_timm_encoder('resnet18', pretrained=False, drop_rate=.2, drop_path_rate=.2)),
         'tv_resnet18': (CheckpointResNet, torchvision.models.resnet18),
         'tf_efficientnet_b0': (CheckpointEfficientNet, lambda: create_timm_encoder('tf_efficientnet_b0', pretrained=False, drop_path_rate=.2)),
         'mobilenetv3_small_100': (CheckpointEfficientNet, lambda: create_timm_encoder('mobilenetv3_small_100', pretrained=False)),
         'vit_tiny': (CheckpointVisionTransformer, lambda: create_timm_encoder('vit_tiny_patch16_224', pretrained=False, depth=4, drop_path_rate=.2, attn_drop_rate=.1))}

def norms(m): return [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]

def train(m, steps=2):
    "All that training steps on crops of two sizes give: losses, gradients, weights, statistics and the state of the random numbers"
    torch.manual_seed(3)
    opt,res = torch.optim.SGD(m.parameters(), lr=.1),[]
    for i in range(steps):
        opt.zero_grad()
        loss = sum(m(imgs(h=h, bs=4, seed=i)).float().pow(2).mean() for h in (64,32))
        loss.backward(); opt.step()
        res += [loss.detach(), *[p.grad for p in m.parameters() if p.grad is not None], *m.state_dict().values()]
    return deepcopy([*res, torch.get_rng_state()])

def assert_same(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('name,n', [('xresnet18',1), ('xresnet18',2), ('xresnet18',7), ('resnet18',2), ('tv_resnet18',7), ('tf_efficientnet_b0',2), ('mobilenetv3_small_100',1),
                                    ('vit_tiny',1), ('vit_tiny',7)])
def test_checkpoint_changes_nothing(name, n):
    "Two crops, one backward pass, dropout and stochastic depth included: outputs, gradients and running statistics are those of the plain model."
    cls,make = ckpts[name]
    plain = make(); wrapped = cls(deepcopy(plain), checkpoint_nchunks=n)
    res = []
    for m in (plain,wrapped):
        torch.manual_seed(3)
        x    = imgs(h=32, bs=4).requires_grad_()
        outs = [m(x), m(imgs(h=48, bs=4, seed=1))]
        sum(o.pow(2).mean() for o in outs).backward()
        res.append((outs, [p.grad for p in m.parameters()], list(m.buffers()), x.grad))
    (o1,g1,b1,x1),(o2,g2,b2,x2) = res
    for a,b in zip([*o1,*g1,*b1,x1], [*o2,*g2,*b2,x2], strict=True): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5*max(1, a.abs().max().item()))
    assert all(b==2 for k,b in plain.named_buffers() if 'num_batches' in k) and all(b==2 for k,b in wrapped.named_buffers() if 'num_batches' in k)
    with torch.no_grad(): assert torch.allclose(plain.eval()(imgs()), wrapped.eval()(imgs()), atol=1e-4)

@pytest.mark.parametrize('name', ckpts)
def test_checkpoint_recomputes(name):
    "Each layer of the chunks runs once more in the backward pass; without gradients it runs once."
    cls,make = ckpts[name]
    m,runs = cls(make(), 2),[]
    seqs = [o for o in m.modules() if isinstance(o, CheckpointSequential)]
    assert seqs and all(o.checkpoint_nchunks==2 for o in seqs)
    for s in seqs: s[0].register_forward_pre_hook(lambda *_: runs.append(1))
    out = m(imgs(bs=4)); assert len(runs)==len(seqs)
    out.sum().backward(); assert len(runs)==2*len(seqs)
    with torch.no_grad(): m(imgs(bs=4))
    assert len(runs)==3*len(seqs)

def kept(m, x):
    "Numbers saved by the nodes of the graph of one forward pass, weights aside"
    seen,own = {},{p.data_ptr() for p in m.parameters()}
    def pack(t):
        if t.data_ptr() not in own: seen[t.data_ptr()] = t.numel()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): _graph = m(x)
    return sum(seen.values())

def test_checkpoint_keeps_fewer_activations():
    e,x = enc('xresnet18'),imgs(h=64, bs=4)
    assert kept(CheckpointSequential(e, 4), x) < kept(e, x)/4
    sizes = [kept(CheckpointSequential(e, n), x) for n in (1,2,4,10)]
    assert sizes==sorted(set(sizes)) # a border for each chunk

def test_checkpoint_sequential_is_the_same_model():
    e = enc('xresnet18'); m = CheckpointSequential(e, 3)
    assert list(m.state_dict()) == list(e.state_dict()) and all(a is b for a,b in zip(e,m, strict=True))
    assert isinstance(m[:3], nn.Sequential) and len(m[:3])==3 and m[:3](imgs()).shape[1]==64
    assert deepcopy(m)(imgs(bs=4)).shape == (4,1024)
    assert encoder_dim(m) == 1024 and encoder_channels(m) == 3
    assert create_model(m, 3)(imgs(bs=4)).shape == (4,3)

@pytest.mark.parametrize('n', range(1,8))
def test_checkpoint_in_place_layers(n):
    "A layer that overwrites what the one before it gives is not parted from it."
    plain = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Dropout(.2, inplace=True), nn.ReLU(inplace=True), nn.Conv2d(4,4,3), nn.ReLU(inplace=True), nn.Flatten())
    assert_same(train(CheckpointSequential(deepcopy(plain), n)), train(plain))

@pytest.mark.parametrize('cls,make,msg', [(CheckpointResNet, lambda: enc('tf_efficientnet_b0'), 'layer1.*CheckpointEfficientNet'),
    (CheckpointEfficientNet, lambda: create_timm_encoder('resnet18', pretrained=False), 'blocks.*CheckpointResNet'),
    (CheckpointVisionTransformer, lambda: nn.Linear(2,2), 'blocks.*CheckpointSequential'), (CheckpointSequential, lambda: nn.Linear(2,2), 'nn.Sequential')])
def test_checkpoint_wrong_model(cls, make, msg):
    with pytest.raises(ValueError, match=msg): cls(make())

@pytest.mark.parametrize('name', ckpts)
def test_checkpoint_wrong_chunks(name):
    cls,make = ckpts[name]
    with pytest.raises(ValueError, match='checkpoint_nchunks=0'): cls(make(), 0)

# ---- one call for all encoders ------------------------------------------------------------------------------------------------

def tm(arch, **kwargs): return create_timm_encoder(arch, pretrained=False, **kwargs)
# The first two are fastai's, SqueezeNet with all its layers in one piece. timm cuts stages (ResNet, EfficientNet), runs single batch norms again (DenseNet),
# or the blocks of modules that are no Sequential (RegNet); the last three have layer norms only. Most draw random numbers on the way.
encs = {'xresnet18':    lambda: enc('xresnet18', widen=.25),
        'squeezenet':   lambda: enc('squeezenet1_1'),
        'resnet':       lambda: tm('test_resnet', drop_rate=.2, drop_path_rate=.2),
        'efficientnet': lambda: tm('test_efficientnet', drop_path_rate=.2),
        'densenet':     lambda: tm('densenet121', block_config=(4,4), growth_rate=16, proj_drop_rate=.2),
        'regnet':       lambda: tm('regnety_002', drop_path_rate=.2),
        'vit':          lambda: tm('test_vit', drop_path_rate=.2, proj_drop_rate=.2, attn_drop_rate=.1),
        'convnext':     lambda: tm('test_convnext', drop_path_rate=.2),
        'swin':         lambda: tm('swin_tiny_patch4_window7_224', embed_dim=24, depths=(2,2), num_heads=(2,2), drop_path_rate=.2)}

@pytest.mark.parametrize('name,mode', [*((o,'float32') for o in encs), *((o,'bfloat16') for o in ('xresnet18','densenet','vit')),
                                       *((o,'frozen') for o in ('xresnet18','resnet','densenet'))])
def test_checkpoint_encoder_changes_nothing(name, mode):
    "Two steps with crops of two sizes; under autocast, and with every other batch norm frozen, too."
    plain = encs[name](); m = checkpoint_encoder(deepcopy(plain))
    if mode=='frozen':
        for e in (plain,m):
            for o in norms(e)[::2]: o.eval()
    with torch.autocast('cpu', torch.bfloat16, enabled=mode=='bfloat16'): a,b = train(plain),train(m)
    assert_same(a, b)
    assert all(o.num_batches_tracked == (4 if o.training else 0) for o in norms(m)) and len(norms(m)) == len(norms(plain))
    assert list(m.state_dict()) == list(plain.state_dict()) and bool(norms(m)) == (name not in ('squeezenet','vit','convnext','swin'))
    assert_same(plain.eval()(imgs(h=64)), m.eval()(imgs(h=64)))

@pytest.mark.parametrize('name', encs)
def test_checkpoint_encoder_recomputes(name):
    "Layers run again in the backward pass in exchange for memory, and once where there is none."
    plain = encs[name](); m,x = checkpoint_encoder(deepcopy(plain)),imgs(h=64, bs=4)
    assert kept(m, x) < .8*kept(plain, x)
    runs,layers = [],[o for o in m.modules() if isinstance(o, (nn.Conv2d,nn.Linear))]
    for o in layers: o.register_forward_pre_hook(lambda *_: runs.append(1))
    out = m(x); n = len(runs)
    out.sum().backward(); assert len(runs) > 1.25*n
    runs.clear()
    with torch.no_grad(): m.eval()(x)
    assert len(runs) == n

@pytest.mark.parametrize('name', ['xresnet18','resnet','vit'])
def test_checkpoint_encoder_twice_copied_and_pickled(name):
    plain = encs[name](); m = checkpoint_encoder(deepcopy(plain))
    x = imgs(h=64, bs=4)
    a = train(deepcopy(plain), 1)
    assert_same(train(checkpoint_encoder(deepcopy(m)), 1), a)
    plain,m = [(train(o, 1), o)[1] for o in (plain,m)]
    for other in (deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert kept(deepcopy(other), x) == kept(deepcopy(m), x)
        assert_same(train(other), train(deepcopy(plain)))
    assert_same(train(m), train(plain)) # its copies have no hold on it

@pytest.mark.parametrize('name', ['resnet','densenet'])
def test_checkpoint_encoder_called_by_its_parts(name):
    "Statistics count what a part of the encoder sees, whoever calls it, once"
    plain = encs[name](); m = checkpoint_encoder(deepcopy(plain))
    for o in (plain,m):
        torch.manual_seed(3)
        o(imgs(h=64, bs=4)).sum().backward(); o.forward_features(imgs(h=64, bs=4, seed=1)).sum().backward()
    assert all(o.num_batches_tracked==2 for o in norms(m))
    assert_same(list(m.buffers()), list(plain.buffers()))

def test_layers_that_share_their_batch_norms():
    "Layers that are in a checkpointed and in a plain network count in both"
    plain = enc('xresnet18', widen=.25); m = CheckpointSequential(plain, 3)
    m(imgs(h=64, bs=4)).sum().backward(); plain(imgs(h=64, bs=4)).sum().backward()
    assert all(o.num_batches_tracked==2 for o in norms(m))

def test_checkpoint_encoder_of_one_that_does():
    m = checkpoint_encoder(checkpoint_encoder(enc('xresnet18'), 4), 3)
    assert type(m) is CheckpointSequential and m.checkpoint_nchunks==3 and not any(isinstance(o, CheckpointSequential) for o in m)
    m = checkpoint_encoder(checkpoint_encoder(enc('squeezenet1_1'), 4), 3) # one chunk of all that matters would save nothing
    assert type(m[0]) is CheckpointSequential and m[0].checkpoint_nchunks==3 and len(m[0])==13 and type(m) is nn.Sequential
    m = CheckpointResNet(torchvision.models.resnet18(), 3)
    assert checkpoint_encoder(m) is m
    m = tm('test_vit')
    assert checkpoint_encoder(checkpoint_encoder(m)) is m

@pytest.mark.parametrize('name', ['resnet','densenet'])
def test_checkpoint_encoder_inside_others(name):
    "As the body of a classifier whose own layers are checkpointed, and with batch norms replaced between two steps, as fastai does to train on several devices."
    plain = nn.Sequential(encs[name](), nn.LazyLinear(3)); plain(imgs())
    m     = deepcopy(plain); checkpoint_encoder(m[0]); m = checkpoint_encoder(m)
    for _ in range(2):
        assert_same(train(m), train(plain))
        m,plain = map(nn.SyncBatchNorm.convert_sync_batchnorm, (m,plain))
        assert all(isinstance(o, nn.SyncBatchNorm) for o in norms(m))

def test_checkpoint_encoder_with_other_batch_norms():
    plain = encs['resnet'](); m = checkpoint_encoder(deepcopy(plain))
    m,plain = map(nn.SyncBatchNorm.convert_sync_batchnorm, (m,plain))
    assert_same(train(m), train(plain))

@pytest.mark.parametrize('name', ['xresnet18','resnet','vit'])
def test_checkpoint_encoder_ddp(name, tmp_path):
    torch.distributed.init_process_group('gloo', store=torch.distributed.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    try:
        plain = encs[name](); m = nn.parallel.DistributedDataParallel(checkpoint_encoder(deepcopy(plain)))
        assert_same(train(m), train(plain))
    finally: torch.distributed.destroy_process_group()

@pytest.mark.parametrize('make,err,msg', [
    (lambda: tm('pit_ti_224'),            ValueError, 'PoolingVisionTransformer.*not supported.*another architecture.*half precision'),
    (lambda: tm('legacy_seresnet18'),     ValueError, 'SENet.*not supported.*another architecture'),
    (lambda: torchvision.models.resnet18(), ValueError, 'ResNet is neither.*CheckpointSequential.*CheckpointResNet'),
    (Noisy,                               ValueError, 'Noisy is neither'),
    (lambda: 'resnet18',                  TypeError,  "encoder='resnet18' must be an nn.Module"),
    (lambda: nn.Linear,                   TypeError,  'must be an nn.Module')])
def test_checkpoint_encoder_refuses(make, err, msg):
    with pytest.raises(err, match=msg): checkpoint_encoder(make())

def test_checkpoint_encoder_wrong_chunks():
    with pytest.raises(ValueError, match='checkpoint_nchunks=0'): checkpoint_encoder(enc('xresnet18'), 0)

@pytest.mark.parametrize('warm', [False,True])
def test_checkpointed_and_compiled(warm):
    "Two sizes before one backward pass, as views are: gradients and statistics of a plain encoder, whether it has run before it is compiled or not; what is around it is compiled"
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    body,graphs = checkpoint_encoder(deepcopy(plain)),[]
    xs = torch.rand(4,3,16,16),torch.rand(4,3,12,12)
    def step(m): sum(m(x).sum() for x in xs).backward()
    if warm: step(body); step(plain)
    def backend(gm, inputs):
        graphs.append([n.target for n in gm.graph.nodes])
        return gm
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body = body
        def forward(self, x): return nn.functional.softplus(self.body(x))
    net = torch.compile(Net(), backend=backend)
    for _ in range(2): step(net); step(nn.Sequential(plain, nn.Softplus()))
    for a,b in zip(body.parameters(), plain.parameters()): torch.testing.assert_close(a.grad, b.grad)
    for a,b in zip(body.buffers(), plain.buffers()): torch.testing.assert_close(a, b)
    assert any('softplus' in str(t) for o in graphs for t in o) and not any('batch_norm' in str(t) for o in graphs for t in o)
    with torch.no_grad(): net.eval()(xs[0])
    assert any('batch_norm' in str(t) for o in graphs for t in o) # without gradients nothing runs twice
    with pytest.raises(Exception, match='leave fullgraph=True out'): torch.compile(body.train(), backend='eager', fullgraph=True)(xs[0])
