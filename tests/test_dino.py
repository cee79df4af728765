"DINO against a loop of its own, in float64, and the attention of the class token against a block written by hand"
import copy, math

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder, SchedCos, SchedLin # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F

import reference
from self_supervised.data import tensor_dls
from self_supervised.layers import create_encoder
from self_supervised.vision.dino import DINO, DINOHead, DINOModel, class_attention, create_dino_model, dino_loss, get_dino_aug_pipelines, show_attention

import test_dist
from methods import Record, corners, images, learner, monitored, quiet, small_encoder
from processes import on_ranks

@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (5,(3,0,2))])
def test_loss(V, ids):
    "The definition, pair by pair; any finite scores, in any type"
    torch.manual_seed(0)
    s,q = torch.randn(V,3,6, dtype=torch.float64, requires_grad=True),torch.randn(len(ids),3,6, dtype=torch.float64).softmax(2).requires_grad_()
    terms = [-sum(q[k,i]*F.log_softmax(s[v,i]/.2, 0)) for k,a in enumerate(ids) for v in range(V) if v!=a for i in range(3)]
    got,want = dino_loss(s, q, ids, .2),torch.stack(terms).mean()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, s)[0], torch.autograd.grad(want, s)[0], rtol=0, atol=1e-12)
    assert got.item()==pytest.approx(reference.swapped_loss(s.detach().numpy(), q.detach().numpy(), ids, .2), abs=1e-12)
    assert dino_loss(s.bfloat16(), q.bfloat16(), ids).dtype==torch.float32 and dino_loss(1e4*s.float(), q.float(), ids).isfinite()
    dino_loss(s, q, ids).backward()
    assert q.grad is None


def scores_by_hand(encoder, head, views):
    "One batch norm pass a size, a perceptron, unit length, weights of unit length times what is learned of it"
    large,rest = torch.cat(views[:2]),torch.cat(views[2:]) if len(views)>2 else None
    x = torch.cat([encoder(o) for o in (large,rest) if o is not None])
    lins = [o for o in head.mlp if isinstance(o, nn.Linear)]
    for i,o in enumerate(lins):
        x = x@o.weight.T + o.bias
        if i<len(lins)-1: x = x*(1+torch.erf(x/math.sqrt(2)))/2
    x,ps = x/x.square().sum(1, keepdim=True).sqrt(),dict(head.last_layer.named_parameters())
    v = ps['weight_v']
    return (x@(v/v.square().sum(1, keepdim=True).sqrt()*ps.get('weight_g', 1)).T).view(len(views), -1, len(v))

@pytest.mark.parametrize('sizes', [(8,8), (8,8,5,5,5,5)])
@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('centring,norm', [('centre',True), ('centre',False), ('sinkhorn',True)])
def test_ten_steps(sizes, accumulate, centring, norm):
    "Loss, targets, centre, every gradient, student and teacher, temperature, weight decay, a frozen last layer; the last batch is short, and two batches make a step"
    torch.manual_seed(0)
    x,bs,lr,wd,wd_end,clip = torch.rand(22,1,12,12, dtype=torch.float64),4,.5,.1,.4,.02
    model = create_dino_model(small_encoder(), 8, 5, 7, norm_last_layer=norm).double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, bs=bs, drop_last=False, shuffle=False, device='cpu')
    cb  = DINO(corners(*sizes), cmom=.8, tmom_start=.9, tpt_start=.04, tpt_end=.07, tpt_warmup_pct=.5, tps=.1, freeze_last_layer=.5, centring=centring, wd_end=wd_end, clip=clip)
    learn = Learner(dls, model, opt_func=SGD, cbs=[cb, Record(lambda learn: [learn.dino.last_codes, learn.opt.hypers[-1]['wd']]), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=wd)
    assert learn.opt.hypers[-1]['wd']==wd and learn.loss_func is dls.loss_func

    plain.train()
    n,done,centre,cut = 0,0,torch.zeros(7, dtype=torch.float64),0
    cos = lambda a,b,p: a+(b-a)*(1-math.cos(math.pi*p))/2
    N = 6 if accumulate else 12
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views,share = [o(batch) for o in corners(*sizes)],done/N
        s = scores_by_hand(plain.encoder, plain.projector, views)
        temp = .04+.03*min(share/.5, 1)
        with torch.no_grad():
            t = scores_by_hand(plain.teacher.encoder, plain.teacher.projector, views[:2])
            if centring=='centre':
                q = ((t-centre)/temp).exp()
                q = q/q.sum(2, keepdim=True)
                centre = .8*centre + .2*t.flatten(0,1).mean(0)
            else: q = torch.tensor(reference.sinkhorn(t.flatten(0,1).tolist(), temp)).view_as(t)
        loss = torch.stack([-(q[a]*F.log_softmax(s[v]/.1, 1)).sum(1).mean() for a in (0,1) for v in range(len(views)) if v!=a]).mean()
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        n += len(batch)
        got_loss,got_codes,got_wd,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(float(loss), abs=1e-10)
        torch.testing.assert_close(got_codes, q, rtol=0, atol=1e-10)
        assert got_wd==pytest.approx(cos(wd, wd_end, share), abs=1e-12)
        if not accumulate or n>=2*bs:
            frozen,m = done<(1.5 if accumulate else 3),cos(.9, 1, share)
            with torch.no_grad():
                for k,p in plain.named_parameters():
                    if not p.requires_grad: continue
                    if 'last_layer' in k and frozen:
                        assert k not in got_grads
                        p.grad = None
                        continue
                    length = p.grad.square().sum().sqrt()
                    if length>clip:
                        p.grad *= clip/(length+1e-6)
                        cut += 1
                    torch.testing.assert_close(got_grads[k], p.grad, rtol=0, atol=1e-10, msg=f'{k} in batch {i}')
                    if not (k.endswith('bias') or k.startswith('encoder.1')): p *= 1-lr*cos(wd, wd_end, share)
                    p -= lr*p.grad
                    p.grad = None
                for part in ('encoder','projector'):
                    for a,b in zip(getattr(plain.teacher, part).parameters(), getattr(plain, part).parameters()): a.copy_(m*a+(1-m)*b)
                    for a,b in zip(getattr(plain.teacher, part).buffers(), getattr(plain, part).buffers()): a.copy_(b)
            n,done = 0,done+1
        for k,v in plain.state_dict().items():
            if k not in ('teacher.updates','centre'): torch.testing.assert_close(state[k].double(), v.double(), rtol=0, atol=1e-10, msg=f'{k} after batch {i}')
        torch.testing.assert_close(state['centre'], centre, rtol=0, atol=1e-10)
    assert done==int(learn.model.teacher.updates)==(5 if accumulate else 12) and cut>3

def test_centre_moves_in_training_only(tmp_path):
    m = (learn := learner('dino', cb=DINO(get_dino_aug_pipelines((2,1), (8,6), bw=False, blur=False, stats=None), wd_end=.5), path=tmp_path)).model
    with learn.no_bar(), learn.no_logging():
        learn.fit(0)
        before = {k:v.clone() for k,v in m.state_dict().items()}
        learn.validate()
        learn.lr_find(num_it=5, show_plot=False)
        assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and learn.opt.hypers[-1]['wd']==.01
        learn.fit(1)
    assert m.centre.abs().sum()>0 and learn.opt.hypers[-1]['wd']==.01

def test_weight_decay_of_a_fit_that_fails():
    "Is moved from its own start again by the next one, and from what that one says"
    class Stop(Callback):
        order = 80
        def after_step(self):
            assert self.opt.hypers[-1]['wd']>.1
            if self.train_iter==3: raise RuntimeError('enough')
    learn = learner('dino', cb=DINO(get_dino_aug_pipelines(2, 8, .4, 1., bw=False, blur=False, stats=None), wd_end=.5), opt_func=Adam)
    with pytest.raises(RuntimeError, match='enough'): quiet(learn, 1, cbs=Stop(), wd=.11)
    for kw,start in (({},.11), (dict(wd=.3),.3)):
        seen = []
        class Look(Callback):
            order = 80
            def after_step(self): seen.append(self.opt.hypers[-1]['wd'])
        quiet(learn, 1, cbs=Look(), **kw)
        assert seen[0]==start<seen[-1] and learn.opt.hypers[-1]['wd']==start
    learn = learner('dino', cb=DINO(get_dino_aug_pipelines(2, 8, .4, 1., bw=False, blur=False, stats=None), wd_end=.5), splitter=lambda m: [list(m.encoder.parameters()), list(m.projector.parameters())])
    learn.create_opt()
    learn.opt.set_hyper('wd', [.1,.2])
    with pytest.raises(ValueError, match="wd_end=0.5: the groups of parameters begin with the weight decays"): quiet(learn, 1)

def test_clipping_comes_after_the_scale_of_half_precision(monkeypatch):
    "Gradients are divided by the scale first, once, and the scaler is told whose"
    from self_supervised.core import SSLCallback
    seen = []
    class Scaler:
        def scale(self, x): return x*1024
        def unscale_(self, opt):
            seen.append(opt)
            for g in opt.param_groups:
                for p in g['params']:
                    if p.grad is not None: p.grad.div_(1024)
    class Half(Callback):
        "What fastai's MixedPrecision does, with the scaler above"
        order,name = SSLCallback.order+1,'mixed_precision'
        def before_fit(self): self.learn.scaler = Scaler()
        def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        def before_step(self): assert seen.pop() is self and not seen
        def after_fit(self): self.learn.scaler = None
        @property
        def param_groups(self): return self.opt.param_groups
    def run(*cbs):
        torch.manual_seed(0)
        learn = learner('dino', tensor_dls(images()/255, bs=8, shuffle=False), cb=DINO(corners(8,8), freeze_last_layer=0, clip=.01), cbs=cbs, opt_func=SGD)
        quiet(learn, 1, lr=.1)
        return torch.cat([p.flatten() for p in learn.model.parameters()])
    torch.testing.assert_close(run(Half()), run(), rtol=0, atol=1e-6)

def test_schedules_of_the_older_package():
    cb = DINO(corners(8,8), tmom_sched=SchedLin, tpt_end=.07, tpt_warmup_pct=.25, tpt_sched=SchedCos)
    s  = cb.schedules()
    assert s['m'](.5)==pytest.approx(.998) and s['tpt'](.125)==pytest.approx(.055) and s['tpt'](.25)==s['tpt'](1.)==.07
    assert DINO(corners(8,8)).schedules()['tpt'](0.)==.04 and DINO(corners(8,8), tmom_sched='no').schedules()['m'](1.)==.996

def test_older_form_of_the_model():
    "Student and teacher as two modules; the teacher takes the student's weights, and keeps its own build"
    class Wrapper(nn.Module):
        def __init__(self, encoder): super().__init__(); self.encoder = encoder
        def forward(self, x): return self.encoder(torch.cat(x) if isinstance(x, list) else x)
    student,teacher = (nn.Sequential(Wrapper(small_encoder()), DINOHead(24, 32, norm_last_layer=True)) for _ in range(2))
    m = DINOModel(student, teacher)
    assert all(torch.equal(a, b) for a,b in zip([*m.teacher.encoder.state_dict().values(), *m.teacher.projector.state_dict().values()], student.state_dict().values(), strict=True))
    learn = Learner(tensor_dls(images()/255, bs=8), m, cbs=DINO(corners(8,8,5), large_crop_ids=[0,1], tpt_start=.04, tpt_end=.04, tpt_warmup_pct=0., freeze_last_layer=1))
    quiet(learn, 2)
    assert m.teacher.updates==10 and m(torch.rand(3,1,9,9)).shape==(3,24)


# Several processes

def fits(folder, bs=test_dist.bs, order=None):
    "Both centrings, with all that moves, on this rank's share"
    res = {}
    for c in ('centre','sinkhorn'):
        set_seed(7)
        dls = tensor_dls(test_dist.pictures(), bs=bs, drop_last=False)
        dls.train.shuffle = False
        if order: dls.train.get_idxs = lambda: order
        cb = DINO(test_dist.corners(*test_dist.multi), tpt_end=.07, tpt_warmup_pct=.5, freeze_last_layer=.5, centring=c, wd_end=.2, clip=.02)
        learn = Learner(dls, test_dist.no_bn_model('dino').double(), opt_func=SGD, path=folder, cbs=[cb, test_dist.Record()])
        learn.remove_cbs([Recorder, ProgressCallback])
        with learn.distrib_ctx(): learn.fit(2, lr=.1, wd=.05)
        res[c] = test_dist.result(learn)
    return res

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_ranks_equal_one(n, tmp_path):
    "Loss, centre, teacher and every gradient of batches that are split among processes, the last unevenly"
    one = fits(tmp_path, test_dist.bs*n, test_dist.joined(n))
    for o in on_ranks(fits, tmp_path, n):
        for c in one: assert test_dist.assert_same_steps(o[c], one[c]) < 1e-9


# Collapse

def run(**kw):
    views = get_dino_aug_pipelines(2, 20, .4, 1., jitter=False, bw=False, blur=False, solarize=False, stats=None)
    return monitored(lambda enc: create_dino_model(enc, 128, 32, 20, nlayers=2), DINO(views, **(dict(tmom_start=.98, freeze_last_layer=.5) | kw)), lr=1e-3, warmup=20)

def test_collapse_is_seen():
    "Without a centre all become one class, or with a temperature that does not sharpen all classes alike; as it should be, neither happens"
    one,alike = run(cmom=1.),run(cmom=1., tpt_start=1., tpt_end=1.)
    assert 'looks like a collapse' in one.warning and one.history['mean_entropy'][-1]<.5
    assert 'looks like a collapse' in alike.warning and alike.history['code_entropy'][-1]>.98
    for whole in (run(), run(centring='sinkhorn')): assert not whole.warning and whole.history['mean_entropy'][-1]>.7 and whole.history['code_entropy'][-1]<.98 and whole.history['std'][-1]>.2


# Attention

def by_hand(vit, x):
    "A forward pass, head by head, up to the attention of the class token in the last block"
    def norm(m, x): return (x-x.mean(-1, keepdim=True))/(x.var(-1, keepdim=True, correction=0)+m.eps).sqrt()*m.weight+m.bias
    n,p,D = len(x),vit.patch_embed.patch_size[0],vit.embed_dim
    h,w = x.shape[2]//p,x.shape[3]//p
    patches = x.view(n,-1,h,p,w,p).permute(0,2,4,1,3,5).reshape(n,h*w,-1)@vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
    x = torch.cat([vit.cls_token.expand(n,-1,-1), patches], 1)+vit.pos_embed
    for i,b in enumerate(vit.blocks):
        y,a = norm(b.norm1, x),b.attn
        q,k,v = (y@W.T+c for W,c in zip(a.qkv.weight.split(D), a.qkv.bias.split(D)))
        outs,d = [],D//a.num_heads
        for j in range(a.num_heads):
            qj,kj,vj = (o[...,j*d:(j+1)*d] for o in (q,k,v))
            att = torch.exp(qj@kj.transpose(1,2)/math.sqrt(d))
            att = att/att.sum(2, keepdim=True)
            outs.append((att, att@vj))
        if i==len(vit.blocks)-1: return torch.stack([o[:,0,1:].view(n,h,w) for o,_ in outs], 1)
        x = x + torch.cat([o for _,o in outs], 2)@a.proj.weight.T + a.proj.bias
        y = norm(b.norm2, x)@b.mlp.fc1.weight.T+b.mlp.fc1.bias
        x = x + y*(1+torch.erf(y/math.sqrt(2)))/2@b.mlp.fc2.weight.T + b.mlp.fc2.bias

def vit(**kwargs):
    torch.manual_seed(0)
    return create_encoder('vit_tiny_patch16_224', pretrained=False, **(dict(n_in=1, img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=3) | kwargs))

@pytest.mark.parametrize('fused', [True, False])
def test_attention_of_the_class_token(fused):
    m,x = vit().double(),torch.rand(5,1,16,16, dtype=torch.float64)
    for p in m.parameters(): p.data.add_(.3*torch.randn_like(p))
    for b in m.blocks: b.attn.fused_attn = fused
    m.blocks[0].eval()
    got = class_attention(m, x)
    torch.testing.assert_close(got, by_hand(m, x).detach(), rtol=0, atol=1e-10)
    assert not got.requires_grad and m.training and not m.blocks[0].training and not any(o._forward_hooks for o in m.modules())
    torch.testing.assert_close(class_attention(create_dino_model(m, 8, 4, 5), x), got)

def test_attention_of_other_sizes():
    m = vit(reg_tokens=2)
    assert class_attention(m, torch.rand(2,1,24,12)).shape==(2,3,6,3)
    axes = show_attention(m, torch.rand(2,1,26,15), stats=None)
    assert len(axes)==8 and axes[0].images[0].get_array().shape[:2]==(24,12) and axes[1].images[0].get_array().shape==(6,3)
    assert [o.get_title() for o in axes[:5]]==['','head 0','head 1','head 2','']
    assert show_attention(m, torch.rand(1,1,8,12), stats=None)[1].images[0].get_array().shape==(2,3) # so few rows are no channels

def test_attention_needs_a_class_token():
    for o in (small_encoder(), vit(class_token=False, pool_type='avg')):
        with pytest.raises(ValueError, match="no class token .*create_encoder\\('vit_small_patch16_224'\\)"): class_attention(o, torch.rand(2,1,16,16))
    with pytest.raises(ValueError, match='images of 1 channels'): show_attention(vit(), torch.rand(2,1,16,16))

def test_a_vision_transformer_trains_on_crops_of_its_patches():
    learn = Learner(tensor_dls(images(16, size=16)/255, bs=8), create_dino_model(vit(drop_path_rate=.5), 16, 8, 10), cbs=DINO(corners(12,12,8,4), freeze_last_layer=0))
    quiet(learn, 1)
    assert learn.recorder.losses[-1].isfinite() and learn.model.teacher.updates==2
