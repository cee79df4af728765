"Scores decide on codes and labels, and are computed in float32 under autocast too"
import pytest, torch
from fastcore.basics import first
from torch import nn
from torch.nn import functional as F

from methods import methods, model
from self_supervised.sinkhorn import sinkhorn_knopp

scored = [nm for nm,m in methods.items() if hasattr(m.model, 'score')]

def test_who_has_scores(): assert {nm for nm,m in methods.items() if m.callback.has_codes}==set(scored)>={'swav','deepcluster','sela','dino'}

def embedded(name, B=512, D=64, K=200):
    "Embeddings in bunches, and a model that takes them for what its last but one layer has said, its prototypes among them"
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(K//2, D), dim=1)
    z = centres[torch.randint(len(centres), (B,))] + .06*torch.randn(B, D)
    m = model(name, projection_size=D, n_protos=K)
    head = m.projector if hasattr(m.projector, 'mlp') else m
    w = first(p for n,p in (head.last_layer if head is m.projector else m.prototypes).named_parameters() if n in ('weight','weight_v'))
    with torch.no_grad(): w.copy_(F.normalize(centres[torch.randint(len(centres), (len(w),))] + .06*torch.randn(len(w), D), dim=1))
    setattr(*((head, 'mlp') if head is m.projector else (m, 'projector')), nn.Identity())
    return m,z,w.detach()

@pytest.mark.parametrize('name', scored)
def test_codes_are_those_of_float32(name):
    m,z,w = embedded(name)
    want_z,want = m.score(z)
    with torch.autocast('cpu', torch.bfloat16): got_z,got = m.score(z)
    assert got.dtype==got_z.dtype==torch.float32 and torch.equal(got, want) and torch.equal(got_z, want_z)
    with torch.autocast('cpu', torch.bfloat16): half = F.linear(F.normalize(z, dim=1), w) # what autocast would make of them
    assert half.dtype==torch.bfloat16
    s = want.flatten(1)[:, :200]
    def differ(a, b): return (a.argmax(1)!=b.argmax(1)).float().mean()
    assert differ(s, half[:, :200])>.005 and differ(sinkhorn_knopp(s), sinkhorn_knopp(half[:, :200]))>.005

@pytest.mark.parametrize('name', scored)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_models_of_another_type(name, dtype):
    "Stay what they are"
    m = model(name).to(dtype)
    x = [torch.rand(4,1,12,12, dtype=dtype)]*2
    assert {o.dtype for o in m(x)}=={dtype}

@pytest.mark.parametrize('name', scored)
def test_one_graph_and_no_values_needed(name):
    "torch.compile makes one graph of the head, and the `meta` device will do, which knows no autocast"
    m = model(name)
    z = torch.rand(4, 8)
    with torch.autocast('cpu', torch.bfloat16): a,b = m.score(z),torch.compile(m.score, backend='eager', fullgraph=True)(z)
    for s,t in zip(a, b): assert torch.equal(s, t)
    assert all(o.is_meta for o in m.to('meta')([torch.rand(2,1,12,12, device='meta')]*2))
