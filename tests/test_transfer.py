"Encoders inside detectors, U-Nets and classifiers: whose weights, whose maps, and what trains"
from copy import deepcopy

import pytest, torch, torchvision
from fastai.data.core import DataLoaders
from fastai.layers import ConvLayer
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.vision.learner import unet_learner, vision_learner
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.rpn import AnchorGenerator

from self_supervised.data import tensor_dls
from self_supervised.layers import CheckpointResNet, CheckpointSequential, checkpoint_encoder, create_encoder
from self_supervised.transfer import encoder_arch, encoder_body, to_detection_backbone
from self_supervised.vision.swav import create_swav_model

from methods import quiet

def plain(n_in=1, chs=(8,12,16)): # three resolutions
    return nn.Sequential(*[ConvLayer(i, o, stride=2) for i,o in zip((n_in,*chs), chs)], nn.AdaptiveAvgPool2d(1), nn.Flatten())

def lively(m):
    "Batch norm statistics and weights that are not the initial 0 and 1"
    for o in m.modules():
        if isinstance(o, nn.modules.batchnorm._BatchNorm):
            for t,(lo,hi) in ((o.running_mean,(-.1,.1)), (o.running_var,(.5,2.)), (o.weight.data,(.5,1.5)), (o.bias.data,(-.1,.1))): t.uniform_(lo, hi)
    return m.eval()

def fastai(nm='xresnet18', n_in=3, **kwargs): return create_encoder(nm, False, n_in, 'avg', **kwargs)
def timm_net(nm='resnet10t', n_in=3, **kwargs): return create_encoder(nm, False, n_in, None, **kwargs)
def tv(): return torchvision.models.resnet18(weights=None)
def ims(n=2, c=3, size=64): return torch.rand(n, c, size, size)


# The body

@pytest.mark.parametrize('make', [plain, fastai, lambda n_in: fastai('resnet18', n_in), lambda n_in: fastai('densenet121', n_in), timm_net,
                                  lambda n_in: timm_net('mobilenetv3_small_050', n_in), lambda n_in: timm_net('efficientnet_lite0', n_in),
                                  lambda n_in: timm_net('regnetx_002', n_in), lambda n_in: timm_net(n_in=n_in, low_resolution=True)])
@pytest.mark.parametrize('n_in', [1,3])
def test_body_pools_to_the_features(make, n_in):
    enc,x = lively(make(n_in=n_in)),ims(c=n_in)
    y = encoder_body(enc)(x)
    assert y.ndim==4 and y.shape[2]>1
    if type(enc).__name__=='MobileNetV3': torch.testing.assert_close(y, enc.forward_features(x)) # it has layers after its pooling
    else: torch.testing.assert_close(y.mean((2,3)), enc(x))

def test_torchvision_model_with_its_classifier():
    m,x = lively(tv()),ims()
    torch.testing.assert_close(m.fc(encoder_body(m)(x).mean((2,3))), m(x))

@pytest.mark.parametrize('wrap', [lambda e: create_swav_model(e, 8, 4, 5), lambda e: Learner([], create_swav_model(e, 8, 4, 5), loss_func=nn.MSELoss()),
                                  lambda e: Learner([], e, loss_func=nn.MSELoss()), CheckpointSequential, lambda e: nn.ModuleList([e])[0]])
def test_what_holds_an_encoder(wrap):
    enc,x = lively(plain()),ims(c=1)
    torch.testing.assert_close(encoder_body(wrap(enc)).eval()(x).mean((2,3)), enc(x))

def test_wrapper_with_one_child():
    m,x = lively(timm_net()),ims()
    torch.testing.assert_close(encoder_body(CheckpointResNet(deepcopy(m)).eval())(x).mean((2,3)), m(x))

def test_the_encoder_stays_as_it_is():
    enc = plain().train()
    enc[0][0].requires_grad_(False)
    before = deepcopy(enc.state_dict())
    backbone = to_detection_backbone(enc, 8, n_maps=3)
    assert enc.training and not enc[0][0].weight.requires_grad and not any(o._forward_hooks or o._forward_pre_hooks for o in enc.modules())
    assert all(torch.equal(v, before[k]) for k,v in enc.state_dict().items())
    assert all(p.requires_grad for p in backbone.parameters()) # what was frozen for another purpose is trained here
    with torch.no_grad(): [p.zero_() for p in backbone.parameters()]
    with torch.no_grad(): [p.zero_() for p in encoder_body(enc).parameters()]
    assert all(torch.equal(v, before[k]) for k,v in enc.state_dict().items())

def test_copy_of_a_checkpointed_encoder_counts_its_batches():
    enc = checkpoint_encoder(timm_net()).train()
    enc(ims()).sum().backward()
    body = encoder_body(enc)
    def stats(): return [b.clone() for n,b in body.named_buffers() if 'running_mean' in n]
    before = stats()
    body.train()(ims())
    assert not any(torch.equal(a, b) for a,b in zip(before, stats()))

def test_a_layer_used_twice():
    act = nn.ReLU()
    enc = nn.Sequential(nn.Conv2d(1,4,3,2,1), act, nn.Conv2d(4,8,3,2,1), act, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x   = ims(c=1)
    torch.testing.assert_close(encoder_body(enc)(x).mean((2,3)), enc(x))
    torch.testing.assert_close(to_detection_backbone(enc, 4, n_maps=2).body(x)['1'].mean((2,3)), enc(x))


# The pyramid

def test_maps_are_those_of_torchvision():
    m,x = lively(tv()),ims()
    want = IntermediateLayerGetter(deepcopy(m), {f'layer{i}':str(i-1) for i in (1,2,3,4)})(x)
    for frozen in (True,False):
        got = to_detection_backbone(m, 8, frozen_bn=frozen).eval().body(x)
        assert list(got)==['0','1','2','3']
        torch.testing.assert_close(dict(got), dict(want))

@pytest.mark.parametrize('nm', ['resnet10t', 'efficientnet_lite0', 'regnetx_002'])
def test_maps_are_those_of_timm(nm):
    m,x = lively(timm_net(nm)),ims()
    want = m.forward_intermediates(x, indices=None, intermediates_only=True)[-4:]
    got  = list(to_detection_backbone(m, 8, n_maps=4).eval().body(x).values())
    n = 3 if nm=='efficientnet_lite0' else 4 # its last map comes after a head of 1×1 convolutions, which timm does not count
    for a,b in zip(got[:n], want[:n]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[-1], m.forward_features(x), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('n', [0,1,3,4,5])
def test_the_same_trains_as_in_torchvision(n):
    want = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=n)
    got  = to_detection_backbone(tv(), trainable_layers=n)
    def sizes(m): return [(p.shape, p.requires_grad) for p in m.parameters()]
    assert sizes(got)==sizes(want)
    got.load_state_dict(dict(zip(got.state_dict(), want.state_dict().values()))) # the same modules in the same order
    x = ims(1)
    torch.testing.assert_close(dict(got.eval()(x)), dict(want.eval()(x)))
    assert got.out_channels==want.out_channels==256

def test_batch_norm():
    m = plain()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(m))
    def kinds(o): return {type(p).__name__ for p in o.modules() if 'Norm' in type(p).__name__}
    assert kinds(to_detection_backbone(m, 8, n_maps=2).body)=={'FrozenBatchNorm2d'}==kinds(to_detection_backbone(sync, 8, n_maps=2).body)
    assert kinds(to_detection_backbone(m, 8, n_maps=2, frozen_bn=False).body)=={'BatchNorm2d'}

def targets(): return [dict(boxes=torch.tensor([[8.,8.,40.,44.]]), labels=torch.tensor([1])), dict(boxes=torch.tensor([[20.,4.,60.,30.],[2.,30.,20.,60.]]), labels=torch.tensor([2,1]))]

@pytest.mark.parametrize('make,n_in,n_maps,trainable', [(plain,1,3,2), (fastai,3,4,3), (timm_net,3,4,1), (plain,3,2,0)])
def test_one_step_of_faster_rcnn(make, n_in, n_maps, trainable):
    backbone = to_detection_backbone(create_swav_model(lively(make(n_in=n_in)), 8, 4, 5), 16, trainable, n_maps)
    sizes = tuple((8*2**i,) for i in range(n_maps+1))
    m = FasterRCNN(backbone, min_size=64, max_size=64, image_mean=[.5]*n_in, image_std=[.25]*n_in, rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20,
                   rpn_anchor_generator=AnchorGenerator(sizes, ((1.,),)*len(sizes)), box_roi_pool=torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(n_maps)], 3, 2),
                   box_head=nn.Sequential(nn.Flatten(), nn.Linear(16*9, 32), nn.ReLU()), box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(32, 3))
    before = {k:v.clone() for k,v in m.state_dict().items()}
    opt    = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=.01)
    losses = m(list(ims(c=n_in)), targets())
    assert set(losses)=={'loss_classifier','loss_box_reg','loss_objectness','loss_rpn_box_reg'} and all(o.isfinite() for o in losses.values())
    sum(losses.values()).backward(); opt.step()
    body,n = backbone.body,len(backbone.body)
    for i,stage in enumerate(body.values()):
        grads = [p.grad is not None and bool(p.grad.any()) for p in stage.parameters()]
        assert all(grads)==any(grads)==(i>=n-trainable)
    assert all(p.grad is not None for p in backbone.fpn.parameters()) and any(p.grad.any() for p in backbone.fpn.parameters())
    for k,v in m.state_dict().items():
        if any(k.startswith(f'backbone.body.{i}.') for i in range(n-trainable)) or 'running' in k: assert torch.equal(v, before[k]), k
    assert not torch.equal(m.state_dict()['backbone.fpn.inner_blocks.0.0.weight'], before['backbone.fpn.inner_blocks.0.0.weight'])
    with torch.no_grad(): assert len(m.eval()(list(ims(c=n_in))))==2


# What it refuses

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.fc = nn.Conv2d(1,4,3,2,1),nn.Conv2d(1,4,3,2,1),nn.Flatten()
    def forward(self, x): return self.fc((self.a(x)+self.b(x)).mean((2,3)))

class Scaled(nn.Sequential):
    def forward(self, x): return super().forward(2*x-1)

@pytest.mark.parametrize('make', [lambda: timm_net('vit_tiny_patch16_224'), Branches, lambda: Scaled(*plain()), lambda: timm_net('swin_tiny_patch4_window7_224'),
                                  lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8))])
def test_not_a_chain(make):
    enc = make()
    n_in = {'Sequential':dict(size=8)}.get(type(enc).__name__, {})
    with pytest.raises(ValueError, match='has no convolution' if n_in else r'not a chain of layers .* create_model\(encoder, n_out\)'): to_detection_backbone(enc, **n_in)

def test_wrong_arguments():
    for n in (0,4):
        with pytest.raises(ValueError, match=f'n_maps={n}: the encoder has 3 resolutions; pass n_maps=3 or less'): to_detection_backbone(plain(), n_maps=n)
    with pytest.raises(ValueError, match='trainable_layers=-1'): to_detection_backbone(plain(), n_maps=2, trainable_layers=-1)
    with pytest.raises(ValueError, match=r'does not run on images of shape \(1, 2, 2\)'): encoder_body(nn.Sequential(nn.Conv2d(1,4,5), *plain(4)), size=2)


# fastai's learners

def dls(y, n_in=1): return DataLoaders.from_dsets(*[list(zip(torch.rand(8, n_in, 32, 32), y))]*2, bs=4, num_workers=0, device='cpu')
def classes(n_in=1): return dls(torch.arange(8)%3, n_in)
def masks(n_in=1): return dls((torch.rand(8,32,32)>.5).long(), n_in)

def convs(m): return [o.weight.clone() for o in m.modules() if isinstance(o, nn.Conv2d)]
def same(a, b): return len(a)==len(b) and all(torch.equal(o, p) for o,p in zip(a, b))

encoders = [(plain,1), (fastai,1), (timm_net,3)]
@pytest.mark.parametrize('make,n_in', encoders)
@pytest.mark.parametrize('kind', ['classifier','unet'])
def test_fastai_learners(kind, make, n_in):
    enc = make(n_in=n_in)
    weights = convs(enc)
    if kind=='classifier': learn = vision_learner(classes(n_in), encoder_arch(enc), n_out=3, loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    else:                  learn = unet_learner(masks(n_in), encoder_arch(enc), n_out=2, loss_func=CrossEntropyLossFlat(axis=1), opt_func=SGD)
    assert same(convs(learn.model[0]), weights)                            # the weights of the encoder
    assert learn.opt.frozen_idx==1 and len(learn.opt.param_lists)==2
    quiet(learn, 1, lr=.1)
    assert same(convs(learn.model[0]), weights)                            # frozen
    learn.unfreeze(); quiet(learn, 1, lr=slice(1e-3,.1))
    assert [h['lr'] for h in learn.opt.hypers]==[1e-3,.1] # a rate for each
    assert not same(convs(learn.model[0]), weights) and same(convs(enc), weights)

def test_export_of_a_classifier(tmp_path):
    data  = tensor_dls((torch.rand(8,1,32,32), torch.arange(8)%3), bs=4)
    learn = vision_learner(data, encoder_arch(plain()), n_out=3, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.export('c.pkl')
    x = ims(c=1, size=32)
    torch.testing.assert_close(load_learner(tmp_path/'c.pkl').model.eval()(x), learn.model.eval()(x))

def test_arch_makes_copies():
    arch,x = encoder_arch(plain()),ims(c=1)
    a,b = arch(),arch(pretrained=False)
    torch.testing.assert_close(a.eval()(x), b.eval()(x))
    with torch.no_grad(): [p.zero_() for p in a.parameters()]
    assert not torch.equal(a(x), b(x))


# Forms that are met more rarely

def test_pooling_to_more_than_one_place_is_still_pooling():
    layers = list(plain())[:3]
    enc,x  = lively(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())),ims(c=1)
    torch.testing.assert_close(encoder_body(enc)(x), nn.Sequential(*layers)(x))

def test_stages_inside_one_layer_that_checkpoints_its_gradients():
    enc,x = lively(nn.Sequential(CheckpointSequential(plain()[:3]), nn.AdaptiveAvgPool2d(1), nn.Flatten())),ims(c=1)
    maps = to_detection_backbone(enc, 8, n_maps=3)(x)
    assert [tuple(o.shape[2:]) for o in maps.values()]==[(32,32), (16,16), (8,8), (4,4)]

def test_more_trainable_layers_than_there_are():
    assert all(p.requires_grad for p in to_detection_backbone(plain(), 8, trainable_layers=4, n_maps=2).parameters())
    assert [o.requires_grad for o in to_detection_backbone(plain(), 8, trainable_layers=2, n_maps=2, frozen_bn=False).body['0'].parameters()]==[False]*3
