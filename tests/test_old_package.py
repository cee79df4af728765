"Code and files of the older package of this name, version 1.0: its names, the order of its arguments, its documented examples, its saved models"
import inspect, io

import pytest, timm, torch
from fastai.vision.all import (Adam, Categorize, DataLoaders, Datasets, GradientClip, GrandparentSplitter, IntToFloatTensor, LabelSmoothingCrossEntropy, Learner, Normalize,
                               ParamScheduler, PILImage, PILImageBW, RandomResizedCrop, RandomSplitter, SaveModelCallback, SchedCos, SchedLin, ShortEpochCallback,
                               TerminateOnNaNCallback, ToTensor, ValueMetric, accuracy, combine_scheds, get_image_files, imagenet_stats, params, parent_label, ranger, set_seed, xresnet18)
from fastcore.foundation import L
from PIL import Image
from torch import nn
from torch.nn import functional as F

from self_supervised import augmentations, layers
from self_supervised.augmentations import *
from self_supervised.data import fashion_mnist, tensor_dls
from self_supervised.export import load_encoder
from self_supervised.features import extract_features
from self_supervised.layers import *
from self_supervised.models import vision_transformer
from self_supervised.models.vision_transformer import *
from self_supervised.vision import byol, dino, metrics, moco, simclr, swav
from self_supervised.vision.byol import *
from self_supervised.vision.dino import *
from self_supervised.vision.metrics import *
from self_supervised.vision.moco import *
from self_supervised.vision.simclr import *
from self_supervised.vision.swav import *

from methods import encoder, images, quiet
from processes import on_ranks

# ---- names and the order of arguments

views = 'size rotate jitter bw blur resize_scale resize_ratio rotate_deg jitter_s blur_s same_on_batch flip_p rotate_p jitter_p bw_p blur_p stats cuda xtra_tfms'
older = {
    augmentations: dict(
        RandomGaussianBlur = 'p s same_on_batch', get_multi_aug_pipelines = 'n size', assert_aug_pipelines = 'aug_pipelines', get_batch_augs = views,
        get_kornia_batch_augs = views.replace(' rotate_p', ''),
        get_torchvision_batch_augs = 'size rotate jitter bw blur resize_scale resize_ratio rotate_deg jitter_s blur_s flip_p bw_p blur_p stats cuda xtra_tfms',
        get_fastai_batch_augs = 'size rotate jitter bw blur min_scale resize_ratio max_lighting rotate_deg blur_s same_on_batch flip_p jitter_p bw_p blur_p stats cuda xtra_tfms'),
    layers: dict(
        create_fastai_encoder = 'arch pretrained n_in pool_type', create_timm_encoder = 'arch pretrained n_in pool_type', create_encoder = 'arch pretrained n_in pool_type',
        create_mlp_module = 'dim hidden_size projection_size bn nlayers', create_cls_module = 'nf n_out lin_ftrs ps use_bn first_bn bn_final lin_first y_range',
        create_model = 'arch n_out pretrained n_in pool_type',
        CheckpointResNet = 'resnet_model checkpoint_nchunks', CheckpointEfficientNet = 'effnet_model checkpoint_nchunks',
        CheckpointVisionTransformer = 'vit_model checkpoint_nchunks', CheckpointSequential = 'fastai_model checkpoint_nchunks'),
    swav: dict(
        SwAVModel = 'encoder projector prototypes', create_swav_model = 'encoder hidden_size projection_size n_protos bn nlayers',
        get_swav_aug_pipelines = 'num_crops crop_sizes min_scales max_scales', SWAV = 'aug_pipelines crop_assgn_ids K queue_start_pct temp eps n_sinkh_iter print_augs'),
    simclr: dict(
        SimCLRModel = 'encoder projector', create_simclr_model = 'encoder hidden_size projection_size bn nlayers', get_simclr_aug_pipelines = 'size',
        SimCLR = 'aug_pipelines temp print_augs', DistributedSimCLR = 'aug_pipelines temp print_augs'),
    moco: dict(
        MoCoModel = 'encoder projector', create_moco_model = 'encoder hidden_size projection_size bn nlayers', get_moco_aug_pipelines = 'size', MOCO = 'aug_pipelines K m temp print_augs'),
    byol: dict(
        BYOLModel = 'encoder projector predictor', create_byol_model = 'encoder hidden_size projection_size bn nlayers', get_byol_aug_pipelines = 'size', BYOL = 'aug_pipelines m print_augs'),
    dino: dict(
        DINOHead = 'in_dim out_dim use_bn norm_last_layer nlayers hidden_dim bottleneck_dim', DINOModel = 'student teacher',
        get_dino_aug_pipelines = 'num_crops crop_sizes min_scales max_scales',
        DINO = 'aug_pipelines large_crop_ids cmom tmom_start tmom_end tmom_sched tpt_start tpt_end tpt_warmup_pct tpt_sched tps freeze_last_layer print_augs'),
    vision_transformer: dict(
        VisionTransformer = 'img_size patch_size in_chans num_classes embed_dim depth num_heads mlp_ratio qkv_bias', MultiCropWrapper = 'encoder',
        deit_tiny = 'patch_size', deit_small = 'patch_size', vit_base = 'patch_size'),
    metrics: dict(KNNProxyMetric = '')}

@pytest.mark.parametrize('module,name', [(m,n) for m,o in older.items() for n in o], ids=lambda o: getattr(o, '__name__', o))
def test_arguments_come_in_the_old_order(module, name):
    "What was added stands behind"
    names,f = older[module][name].split(),getattr(module, name)
    ps = [o for o in inspect.signature(f.__init__ if isinstance(f, type) else f).parameters if o!='self']
    assert ps[:len(names)]==names and name in module.__all__

def seen(pipe):
    "What the steps of a pipeline were told"
    return [(type(f).__name__, {k:v for k,v in vars(f).items() if isinstance(v, (bool,int,float,tuple))}, repr(getattr(f, 'f', ''))) for f in pipe.fs]

@pytest.mark.parametrize('name', [o for o in older[augmentations] if o.endswith('batch_augs')])
def test_builders_by_position(name):
    "All of the old arguments in their old places, each with a value that nobody else has"
    f,names = getattr(augmentations, name),older[augmentations][name].split()
    vals = dict(size=16, rotate=True, jitter=True, bw=True, blur=True, resize_scale=(.5,.6), resize_ratio=(1.,1.5), rotate_deg=12, jitter_s=.4, blur_s=(.3,.4), same_on_batch=True,
                flip_p=.11, rotate_p=.22, jitter_p=.33, bw_p=.44, blur_p=.55, stats=([.4]*3,[.2]*3), cuda=False, xtra_tfms=[], min_scale=.35, max_lighting=.15)
    a,b = f(*(vals[k] for k in names)),f(**{k:vals[k] for k in names})
    assert seen(a)==seen(b)!=seen(f(16))
    x = torch.rand(4,3,20,20)
    set_seed(3); va = a(x)
    set_seed(3); vb = b(x)
    assert va.shape==(4,3,16,16) and torch.equal(va, vb)

def test_min_scale_and_max_lighting():
    "Crops are at least so large, and grey levels move by so much: fastai adds to the logit, brightness by up to logit(½+max_lighting/2), and contrast stretches that a little"
    g = (torch.arange(64)+.5)/64
    x = torch.stack([g.expand(64,64), g[:,None].expand(64,64), torch.full((64,64), .5)]).expand(300,3,64,64)
    v = get_fastai_batch_augs(64, False, False, False, False, .5, flip_p=0., stats=None)(x)
    areas = (v[:,0,32,-1]-v[:,0,32,0])*(v[:,1,-1,32]-v[:,1,0,32])*(64/63)**2
    assert .47<areas.min()<.56 and areas.max()>.9
    def spread(**kw): return (get_fastai_batch_augs(8, bw=False, blur=False, jitter_p=1., stats=None, **kw)(torch.full((300,1,8,8), .5))-.5).abs().max()
    for kw,by in ((dict(max_lighting=.2), .1), (dict(max_lighting=.8), .4), (dict(jitter_s=.5), .1)): assert by-.01<spread(**kw)<by*1.25

def test_classifier_by_position():
    m = create_model('resnet18', 10, False, 1, 'avg', [32], .1, True, False)
    assert [type(o).__name__ for o in m[1]]==['Dropout','Linear','ReLU','BatchNorm1d','Dropout','Linear'] and m[1][1].weight.shape==(32,512) and m[1][0].p==.05
    assert m(torch.rand(2,1,32,32)).shape==(2,10)
    with pytest.raises(TypeError): create_model('resnet18', 10, False, 1, 'avg', True) # our own `low_resolution` goes by name

# ---- documented examples

@pytest.fixture
def dls(tmp_path):
    "Images in folders of the layout of MNIST_TINY, loaded as the pages load them"
    x,y = fashion_mnist()[0]
    for i,(o,c) in enumerate(zip(x[:48], y[:48].tolist())):
        d = tmp_path/('train' if i<32 else 'valid')/str(c%2)
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(o[0].numpy()).save(d/f'{i}.png')
    items = sorted(tmp_path.rglob('*.png'))
    ids   = [[i for i,o in enumerate(items) if o.parts[-3]==s] for s in ('train','valid')]
    tds   = Datasets(items, [PILImageBW.create, [parent_label, Categorize()]], splits=ids)
    return tds.dataloaders(bs=5, after_item=[ToTensor(), IntToFloatTensor()], device='cpu')

def small(method=get_simclr_aug_pipelines, **kw): return method(**kw, rotate=False, jitter=False, bw=False, blur=False, stats=None, cuda=False)

def test_example_of_swav(dls, capsys):
    model = create_swav_model(create_fastai_encoder(xresnet18, n_in=1, pretrained=False), hidden_size=2048, projection_size=128)
    pipes = small(get_swav_aug_pipelines, num_crops=[2,6], crop_sizes=[28,16], min_scales=[.25,.05], max_scales=[1.,.3])
    learn = Learner(dls, model, cbs=[SWAV(aug_pipelines=pipes, crop_assgn_ids=[0,1], K=None, print_augs=True), ShortEpochCallback(.001)])
    assert learn.swav.augs==pipes and capsys.readouterr().out.count('RandomCropResize')==8
    learn._split(dls.one_batch())
    learn('before_batch')
    learn.pred = learn.model(*learn.xb)
    assert [len(o) for o in learn.pred]==[40,40] and len(learn.swav.show(n=4))==32
    quiet(learn, 1)
    assert len(learn.recorder.losses)==1
    for k in 'K queue_start_pct crop_assgn_ids temp eps n_sinkh_iter augs'.split(): assert hasattr(learn.swav, k)

def test_example_of_simclr(dls, capsys):
    pipes = small(size=28)
    for cls in (SimCLR, DistributedSimCLR):
        model = create_simclr_model(create_encoder('xresnet18', n_in=1, pretrained=False), hidden_size=2048, projection_size=128)
        learn = Learner(dls, model, cbs=[cls(pipes, temp=.07, print_augs=True), ShortEpochCallback(.001)])
        assert capsys.readouterr().out.count('RandomCropResize')==2
        cb = learn.cbs[-2] if isinstance(learn.cbs[-2], SimCLR) else next(o for o in learn.cbs if isinstance(o, SimCLR))
        assert cb.aug1 is pipes[0] and cb.aug2 is pipes[1] and cb.temp==.07
        learn._split(dls.one_batch())
        learn('before_batch')
        assert len(cb.show(n=5))==10
    assert learn.distributed_sim_clr is cb

def test_example_of_moco(dls, capsys):
    "A batch that no view has been made of yet, a picture, a fit"
    model = create_moco_model(create_encoder('xresnet18', n_in=1, pretrained=False), hidden_size=1024, projection_size=128)
    pipes = small(get_moco_aug_pipelines, size=28)
    learn = Learner(dls, model, cbs=[MOCO(aug_pipelines=pipes, K=20, print_augs=True), ShortEpochCallback(.001)])
    assert capsys.readouterr().out.count('RandomCropResize')==2
    learn._split(dls.one_batch())
    learn.pred = learn.model(*learn.xb)
    assert learn.pred.shape==(5,128) and len(learn.moco.show(n=5))==10
    quiet(learn, 1)
    cb = learn.moco
    assert len(learn.recorder.losses)==1 and (cb.K,cb.m,cb.temp)==(20,.999,.07) and cb.aug_pipelines==pipes

def test_example_of_byol(dls, capsys):
    "Its picture is of the batch that a fit has begun with"
    model = create_byol_model(create_fastai_encoder(xresnet18, n_in=1, pretrained=False), hidden_size=512, projection_size=256, bn=True)
    pipes = small(get_byol_aug_pipelines, size=28)
    learn = Learner(dls, model, cbs=[BYOL(aug_pipelines=pipes, print_augs=True), ShortEpochCallback(.001)])
    assert capsys.readouterr().out.count('RandomCropResize')==2
    learn._split(dls.one_batch())
    for event in ('before_fit', 'before_batch'): learn(event)
    assert len(learn.byol.show(n=5))==10
    quiet(learn, 1)
    assert len(learn.recorder.losses)==1 and 0<=learn.recorder.losses[0]<=4 and learn.byol.aug_pipelines==pipes

@pytest.fixture
def imagewang(tmp_path):
    "Images in folders of its layout: of classes, for training and validation, and of none"
    x,y = fashion_mnist()[0]
    for i,(o,c) in enumerate(zip(x[:40], y[:40].tolist())):
        d = tmp_path/('unsup' if i%5==4 else f'{"val" if i%5==3 else "train"}/n0{c%2}')
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(o[0].numpy()).convert('RGB').save(d/f'{i}.png')
    return tmp_path

def wang_dls(source, files, splits, *item_tfms, norm=()):
    tds = Datasets(files, [[PILImage.create, ToTensor, *item_tfms], [parent_label, Categorize()]], splits=splits(files))
    return tds.dataloaders(bs=8, num_workers=0, after_batch=[IntToFloatTensor, *norm], path=source, device='cpu')

@pytest.mark.parametrize('name', ['moco', 'byol'])
def test_notebook_on_imagewang(name, imagewang):
    "Pretraining on all images, files of model and encoder, and a classifier on the encoder, in groups of parameters"
    files = get_image_files(imagewang)
    dls   = wang_dls(imagewang, files, RandomSplitter(valid_pct=.1), RandomResizedCrop(32, min_scale=1.))
    assert len(dls.train_ds)==36 and len(dls.vocab)==3
    encoder = create_encoder('xresnet18', pretrained=False, n_in=3)
    model,get = dict(moco=(create_moco_model,get_moco_aug_pipelines), byol=(create_byol_model,get_byol_aug_pipelines))[name]
    pipes = get(28, rotate=True, rotate_deg=10, jitter=True, bw=True, blur=False)
    learn = Learner(dls, model(encoder), cbs=[dict(moco=lambda: MOCO(pipes, K=16), byol=lambda: BYOL(pipes))[name]()])
    learn.unfreeze()
    before = encoder[0][0].weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(1, 1e-2, wd=1e-2, pct_start=.5)
    assert len(learn.recorder.losses)==4 and not torch.equal(before, learn.model.encoder[0][0].weight)
    learn.save('whole')
    file = learn.path/learn.model_dir/'encoder.pth'
    torch.save(learn.model.encoder.state_dict(), file)

    files = get_image_files(imagewang, folders=['train','val'])
    dls   = wang_dls(imagewang, files, GrandparentSplitter(valid_name='val'), RandomResizedCrop(28, min_scale=.35), norm=[Normalize.from_stats(*imagenet_stats, cuda=False)])
    encoder = create_encoder('xresnet18', pretrained=False, n_in=3)
    encoder.load_state_dict(torch.load(file))
    nf   = encoder(torch.randn(2,3,32,32)).size(-1)
    tune = Learner(dls, nn.Sequential(encoder, create_cls_module(nf, dls.c)), opt_func=ranger, splitter=lambda m: L(m[0], m[1]).map(params), metrics=accuracy, loss_func=LabelSmoothingCrossEntropy())
    tune.unfreeze()
    with tune.no_bar(), tune.no_logging(): tune.fit_flat_cos(1, 1e-2, wd=1e-2)
    assert len(tune.opt.param_groups)==2 and 0<=tune.recorder.values[-1][-1]<=1
    learn.load('whole')

def dino_pair(**kwargs):
    encoder = MultiCropWrapper(deit_tiny(patch_size=8, img_size=32, in_chans=1, depth=2, **kwargs))
    return nn.Sequential(encoder, DINOHead(encoder.encoder.embed_dim, 2**5, norm_last_layer=True, hidden_dim=16, bottleneck_dim=8))

def test_example_of_dino(dls, tmp_path):
    "A student that skips blocks and a teacher that does not, views of two sizes, schedules of the user's own, files after epochs"
    student,teacher = dino_pair(drop_path_rate=.1),dino_pair()
    views = [torch.rand(4,1,s,s) for s in (32,32,16,16,16,16)]
    preds = student.eval()(views)
    assert preds.shape==(24,32) and teacher(views[:2]).shape==(8,32) and torch.allclose(preds, torch.cat([student(o) for o in views]), atol=1e-6)
    model = DINOModel(student, teacher)
    pipes = small(get_dino_aug_pipelines, crop_sizes=(24,16), solarize=False)
    cb    = DINO(aug_pipelines=pipes, tpt_start=.04, tpt_end=.04, tpt_warmup_pct=0., freeze_last_layer=0)
    cbs   = [cb, GradientClip(max_norm=3., norm_type=2.), SaveModelCallback(every_epoch=1, with_opt=True, fname='dino'), TerminateOnNaNCallback()]
    learn = Learner(dls, model, opt_func=Adam, cbs=cbs, path=tmp_path)
    learn._split(dls.one_batch())
    for event in ('before_fit', 'before_batch'): learn(event)
    assert len(learn.dino.show(n=2))==12
    lr,first = combine_scheds([.1,.9], [SchedLin(0.,2.5e-3), SchedCos(2.5e-3,1e-6)]),model.encoder.cls_token.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[ParamScheduler({'lr':lr, 'wd':SchedCos(.04,.4)})])
    assert learn.dino is cb and len(learn.recorder.losses)==6 and cb.aug_pipelines==pipes and (cb.cmom,cb.tps,cb.freeze_last_layer)==(.9,.1,0) and list(cb.large_crop_ids)==[0,1]
    assert not torch.equal(first, model.encoder.cls_token) and not torch.equal(model.teacher.encoder.cls_token, model.encoder.cls_token)
    assert .04<learn.opt.hypers[-1]['wd']<=.4
    learn.load('dino_0')

    x,vit = torch.rand(3,1,32,24),model.encoder.eval()
    out = vit.get_intermediate_layers(x, 2)
    cls = nn.Sequential(vit, create_cls_module(vit.norm.weight.size(0), 10))
    assert [o.shape for o in out]==[(3,1+4*3,192)]*2 and torch.equal(out[-1][:,0], vit(x)) and cls(x).shape==(3,10)
    assert torch.equal(load_encoder(learn.export_encoder(tmp_path/'encoder.safetensors')).eval()(x), vit(x))

def test_tokens_of_blocks():
    "Against what the blocks themselves hand on; and the network is timm's, for images of every size"
    vit   = deit_tiny(depth=3).eval()
    plain = timm.create_model('vit_tiny_patch16_224', depth=3, num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(vit.state_dict())
    x,seen = torch.rand(2,3,48,80),[]
    for b in vit.blocks[-2:]: b.register_forward_hook(lambda m,_,o: seen.append(vit.norm(o)))
    with torch.no_grad(): feats,want = vit(x),seen[:2]
    assert torch.equal(feats, plain(x)) and torch.equal(feats, want[1][:,0])
    for a,b in zip(vit.get_intermediate_layers(x, 2), want, strict=True): assert torch.equal(a, b)

def test_example_of_the_metric(dls):
    cbs    = [SimCLR(small(size=28), temp=.07)]
    metric = KNNProxyMetric()
    learn  = Learner(dls, create_simclr_model(create_encoder('xresnet18', n_in=1, pretrained=False), hidden_size=64, projection_size=32), cbs=cbs+[metric],
                     metrics=ValueMetric(metric.accuracy, metric_name='knn_accuracy'))
    with learn.no_bar(), learn.no_logging(): res = learn.validate()
    z,y = extract_features(learn, dls.valid)
    assert res[1]==pytest.approx(by_hand(z, y))
    quiet(learn, 2)
    z,y = extract_features(learn, dls.valid)
    assert learn.recorder.metric_names[-2]=='knn_accuracy' and learn.recorder.values[-1][-1]==pytest.approx(by_hand(z, y))
    assert not metric.embs # nothing is kept after a fit

def by_hand(z, y):
    "Nearest by cosine, itself left out"
    hits = 0
    for i in range(len(z)):
        s = [F.cosine_similarity(z[i], z[j], dim=0).item() if j!=i else -2. for j in range(len(z))]
        hits += int(y[s.index(max(s))]==y[i])
    return hits/len(z)

def test_metric_does_not_count_itself():
    "Two pairs and a loner: with itself counted all would be right, and the second neighbour, which the older class took, is wrong for the pairs"
    x = torch.tensor([[1,.02,0], [1,0,.02], [.02,1,0], [0,1,.02], [0,0,1]])[:,:,None,None]
    y = torch.tensor([0,0,1,1,2])
    cb    = KNNProxyMetric()
    learn = Learner(DataLoaders(*[tensor_dls((x,y), (x,y), bs=b)[1] for b in (2,2)]), nn.Sequential(nn.Conv2d(3,3,1,bias=False), nn.Flatten()), loss_func=lambda p,t: p.sum()*0, cbs=cb, metrics=ValueMetric(cb.accuracy))
    with torch.no_grad(): learn.model[0].weight.copy_(torch.eye(3)[...,None,None])
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx(4/5)

def test_metric_sees_images_and_changes_nothing():
    "uint8 images are normalised as in training; modes, random numbers and weights stay"
    x,y = images(24, c=3),torch.arange(24)%3
    augs = get_simclr_aug_pipelines(12)
    def fit(cbs):
        set_seed(0)
        learn = Learner(tensor_dls((x,y), (x,y), bs=8), create_simclr_model(encoder(3)), cbs=[SimCLR(augs), *cbs])
        set_seed(1)
        quiet(learn, 2, 1e-2)
        return learn
    class Keep(KNNProxyMetric):
        def after_validate(self): self.kept = torch.cat(list(self.embs))
    a,b = fit([]),fit([Keep()])
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True): assert torch.equal(p, q)
    assert torch.allclose(b.keep.kept, extract_features(b, b.dls.valid)[0], atol=1e-6)

def judged(folder):
    "Thirteen validation images, an odd number, on one of two processes"
    set_seed(3)
    x,y = images(13, size=14),torch.arange(13)%2
    cb  = KNNProxyMetric()
    learn = Learner(tensor_dls((images(16), torch.arange(16)%2), (x,y), bs=4), create_simclr_model(encoder(bn=False)), path=folder, cbs=[SimCLR(small(size=12)), cb], metrics=ValueMetric(cb.accuracy))
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    return learn.recorder.values[-1][-1],by_hand(*extract_features(learn, learn.dls.valid))

@pytest.mark.slow
def test_metric_on_two_processes(tmp_path):
    "The images of both are neighbours, and the one that makes the halves equal does not meet itself"
    for acc,want in on_ranks(judged, tmp_path, 2): assert acc==pytest.approx(want)

def test_metric_without_labels():
    cb = KNNProxyMetric()
    with pytest.raises(ValueError, match='dls.valid has no labels'): quiet(Learner(tensor_dls(images(), images(8), bs=8), create_simclr_model(encoder()), cbs=[SimCLR(small(size=12)), cb]), 1)
    with pytest.raises(ValueError, match='no image has been validated yet'): cb.accuracy()

# ---- saved models

def through_a_file(state):
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return torch.load(f, weights_only=True)

def equal(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_model_of_swav():
    "It had no queue in its state: what is loaded has an empty one, also where there was another before"
    old,new = (create_swav_model(encoder(), 16, 8, n_protos=10) for _ in range(2))
    new.queue.resize(2, 4, 8)
    new.queue.push(F.normalize(torch.randn(2,4,8), dim=2))
    state = through_a_file({k:v for k,v in old.state_dict().items() if not k.startswith('queue.')})
    assert not new.load_state_dict(state).missing_keys and not new.queue.full and equal(old, new)
    learn = Learner(tensor_dls(images(), bs=8), new, cbs=SWAV(small(get_swav_aug_pipelines, num_crops=[2,1], crop_sizes=[12,8], min_scales=[.4,.1], max_scales=[1.,.4]), [0,1], K=16, queue_start_pct=0.))
    quiet(learn, 1, 1e-3)
    assert new.queue.full
    with pytest.raises(RuntimeError, match='Missing key.*prototypes.weight'): new.load_state_dict({k:v for k,v in state.items() if 'prototypes' not in k}) # the rest is asked for as ever

def test_model_of_dino():
    "The student's transformer, taken out of a file as the notebook does; a file where nothing has that name leaves the weights, and says so"
    plain = timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=0).eval()
    state = through_a_file({f'{who}.0.encoder.{k}':v for who in ('student','teacher') for k,v in plain.state_dict().items()} | {'student.1.mlp.0.weight':torch.ones(2,2), 'C':torch.zeros(1,4)})
    names = {k: '.'.join(k.split('.')[3:]) for k in state if 'student' in k}
    vit = deit_tiny(depth=2).eval()
    assert vit.load_state_dict({v:state[k] for k,v in names.items()}, strict=False).missing_keys==[]
    x = torch.rand(2,3,224,224)
    assert torch.equal(vit(x), plain(x))
    ours = DINOModel(nn.Sequential(MultiCropWrapper(vit), DINOHead(192, 8))).state_dict()
    with pytest.warns(UserWarning, match='none of the 0 names given is one of this VisionTransformer.*model.encoder'): vit.load_state_dict({k:v for k,v in ours.items() if 'student' in k}, strict=False)
    assert torch.equal(vit(x), plain(x))
    vit.load_state_dict({k.removeprefix('encoder.'):v for k,v in ours.items() if k.startswith('encoder.')})

def wrapped_sequential(): return create_fastai_encoder(xresnet18, False, 1),CheckpointSequential,lambda k: [f'fastai_model.{k}']
def wrapped_resnet():
    def names(k): return [f'resnet_model.{k}'] + ([f'forward_layers.{int(k[5])-1}{k[6:]}'] if k.startswith('layer') else [])
    return create_timm_encoder('resnet10t', False, 1, 'avg'),CheckpointResNet,names
def wrapped_efficientnet(): return create_timm_encoder('test_efficientnet', False, 1, 'avg'),CheckpointEfficientNet,lambda k: [f'effnet_model.{k}']
def wrapped_vit(): return create_timm_encoder('test_vit', False, 1),CheckpointVisionTransformer,lambda k: [f'vit_model.{k}']
wrappers = [wrapped_sequential, wrapped_resnet, wrapped_efficientnet, wrapped_vit]

@pytest.mark.parametrize('build', wrappers, ids=lambda o: o.__name__)
def test_files_of_checkpointing_encoders(build):
    "By themselves and inside of a model, under the names that the older classes gave their parts"
    plain,wrap,names = build()
    state = {n:v for k,v in plain.state_dict().items() for n in names(k)}
    x,want = torch.rand(2,1,64,64),plain.eval()
    for inside in (False, True):
        new = wrap(build()[0]).eval()
        whole = create_simclr_model(new, 8, 4) if inside else new
        pre,rest = ('encoder.', {f'projector.{k}':v for k,v in whole.projector.state_dict().items()}) if inside else ('', {})
        whole.load_state_dict(through_a_file({f'{pre}{k}':v for k,v in state.items()} | rest))
        with torch.no_grad(): assert torch.allclose(new(x), want(x), atol=1e-6)
        assert whole.load_state_dict(through_a_file(whole.state_dict())) # and our own names as before
    with pytest.raises(RuntimeError, match='Missing key'): wrap(build()[0]).load_state_dict({k:v for k,v in list(state.items())[3:]})

def test_stages_that_were_saved_under_one_name_only():
    "safetensors keeps one of two names for a tensor"
    plain,wrap,names = wrapped_resnet()
    new = wrap(wrapped_resnet()[0])
    new.load_state_dict({names(k)[-1]:v for k,v in plain.state_dict().items()})
    assert equal(plain, new.resnet_model)

@pytest.mark.parametrize('build', wrappers[2:], ids=lambda o: o.__name__)
def test_forward_features(build):
    "What is pooled of an EfficientNet, and the vector in front of the classifier of a vision transformer; with gradients as without checkpointing"
    plain,wrap,_ = build()
    new = wrap(build()[0])
    getattr(new, {'wrapped_vit':'vit_model'}.get(build.__name__, 'effnet_model')).load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(2,1,64,64)
    f = new.eval().forward_features(x)
    if build is wrapped_vit: assert torch.allclose(f, plain.eval().forward_features(x)[:,0] if plain.global_pool=='token' else plain(x), atol=1e-6) and f.shape==plain(x).shape
    else: assert f.ndim==4 and torch.allclose(plain.eval().global_pool(f), plain(x), atol=1e-6)
    f.sum().backward()
    plain.eval()(x).sum() if build is wrapped_vit else None
    assert all(p.grad is not None for n,p in new.named_parameters() if 'norm' not in n and 'head' not in n)
