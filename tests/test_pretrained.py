"Released weights, in files of their layout that are written here, against torchvision's ResNet-50 and a plain ResNet of any width; nothing is fetched"
import gzip, io, random, re, shutil, sys, tarfile, zipfile
from copy import deepcopy
from urllib.error import URLError

import numpy as np, pytest, timm, torch, torchvision
from fastai.learner import Learner
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from methods import quiet
from self_supervised.all import SWAV, create_encoder, create_model, create_timm_encoder, create_simclr_model, encoder_info, get_swav_aug_pipelines, load_encoder, tensor_dls
from self_supervised.methods import ssl_methods
from self_supervised.layers import CheckpointSequential
from self_supervised.pretrained import create_official_model, export_onnx, to_layout, load_official, official_weights, read_official
from self_supervised import encoders

pytestmark = pytest.mark.slow

class Plain(nn.Module):
    "ResNet-50 with widths times `w`, in the words of the authors' code: names, order, and a stem that pads in two places"
    def __init__(self, w=1):
        super().__init__()
        n = 64*w
        self.pad,self.conv1,self.bn1 = nn.ConstantPad2d(1, 0.),nn.Conv2d(3, n, 7, 2, 2, bias=False),nn.BatchNorm2d(n)
        ni = n
        for i,depth in enumerate((3,4,6,3), 1):
            mid,blocks = n*2**(i-1),[]
            for j in range(depth):
                stride = 2 if i>1 and j==0 else 1
                b = nn.Module()
                b.conv1,b.bn1 = nn.Conv2d(ni, mid, 1, bias=False),nn.BatchNorm2d(mid)
                b.conv2,b.bn2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False),nn.BatchNorm2d(mid)
                b.conv3,b.bn3 = nn.Conv2d(mid, 4*mid, 1, bias=False),nn.BatchNorm2d(4*mid)
                if j==0: b.downsample = nn.Sequential(nn.Conv2d(ni, 4*mid, 1, stride, bias=False), nn.BatchNorm2d(4*mid))
                blocks,ni = [*blocks,b],4*mid
            setattr(self, f'layer{i}', nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(self.pad(x)))), 3, 2, 1)
        for i in range(1, 5):
            for b in getattr(self, f'layer{i}'):
                y = F.relu(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))))
                x = F.relu(b.bn3(b.conv3(y)) + (b.downsample(x) if hasattr(b, 'downsample') else x))
        return x.mean((2,3))

@torch.no_grad()
def stir(net):
    "Batch norms that are not as new"
    for k,v in net.state_dict().items():
        if k.endswith('running_mean'): v.normal_(0, .1)
        elif k.endswith('running_var'): v.uniform_(.5, 2)
        elif 'bn' in k or 'downsample.1' in k:
            if v.is_floating_point(): v.uniform_(.5, 1)
        elif k.endswith('num_batches_tracked'): v.fill_(7)
    return net.eval()

def heads(nf=2048, hidden=32, dim=8, protos=(20,)):
    names = ['prototypes.weight'] if len(protos)==1 else [f'prototypes.prototypes{i}.weight' for i in range(len(protos))]
    mlp   = nn.Sequential(nn.Linear(nf, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
    return {**{f'projection_head.{k}':v for k,v in mlp.state_dict().items()}, **{k:F.normalize(torch.randn(n, dim)) for k,n in zip(names, protos)}}

def write(path, net, hs):
    torch.save({f'module.{k}':v for k,v in {**net.state_dict(), **hs}.items() if not k.startswith('fc.')}, path)
    return path

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    res = torchvision.models.resnet50(weights=None)
    res.fc = nn.Identity()
    return stir(res)

@pytest.fixture(scope='module')
def files(net, tmp_path_factory):
    "Files as the authors' host has them, in the place where PyTorch looks before it fetches"
    hub,home = tmp_path_factory.mktemp('hub'),torch.hub.get_dir()
    (hub/'checkpoints').mkdir()
    torch.hub.set_dir(hub)
    write(hub/'checkpoints'/'swav_800ep_pretrain.pth.tar', net, heads())
    write(hub/'checkpoints'/'deepclusterv2_400ep_pretrain.pth.tar', net, heads(protos=(20,20,20)))
    yield hub/'checkpoints'
    torch.hub.set_dir(home)

@pytest.fixture(scope='module')
def file(files): return files/'swav_800ep_pretrain.pth.tar'

@pytest.fixture(scope='module')
def x(): return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

def close(a, b):
    a,b = a.detach(),b.detach()
    assert a.shape==b.shape and ((a-b).abs().max()/b.abs().max())<1e-5

def test_released_names():
    names = {'swav_800ep', 'swav_400ep', 'swav_200ep', 'swav_100ep', 'swav_200ep_bs256', 'swav_400ep_bs256', 'swav_400ep_2x224', 'swav_RN50w2_400ep', 'swav_RN50w4_400ep',
             'swav_RN50w5_400ep', 'deepclusterv2_800ep', 'deepclusterv2_400ep', 'deepclusterv2_400ep_2x224', 'selav2_400ep', 'selav2_400ep_2x224'}
    dino = dict(dino_vits16='dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth', dino_resnet50='dino_resnet50_pretrain/dino_resnet50_pretrain.pth')
    assert set(official_weights())==names|set(dino)|set(mocov3)
    for k,(arch,epochs,top1,nm) in mocov3.items():
        o = official_weights()[k]
        assert (o.arch,o.method,o.epochs,o.batch,o.top1,o.url)==(arch, 'MoCo v3', epochs, 4096, top1, f'https://dl.fbaipublicfiles.com/moco-v3/{nm}/{nm}.pth.tar') and f'_{epochs}ep' in k
    for k,v in dino.items(): assert official_weights()[k].url==f'https://dl.fbaipublicfiles.com/dino/{v}' and official_weights()[k].method=='DINO'
    for k in names:
        o = official_weights()[k]
        assert o.url==f'https://dl.fbaipublicfiles.com/deepcluster/{k}_pretrain.pth.tar'
        assert str(o.epochs) in k and o.arch==('resnet50'+k[9:11] if 'RN50' in k else 'resnet50') and o.method.split('-')[0].lower() in k

mocov3 = { # CONFIG.md of facebookresearch/moco-v3
    'mocov3_resnet50_100ep':('resnet50', 100, 68.9, 'r-50-100ep'), 'mocov3_resnet50_300ep':('resnet50', 300, 72.8, 'r-50-300ep'), 'mocov3_resnet50_1000ep':('resnet50', 1000, 74.6, 'r-50-1000ep'),
    'mocov3_vits16_300ep':('vit_small_patch16_224', 300, 73.2, 'vit-s-300ep'), 'mocov3_vitb16_300ep':('vit_base_patch16_224', 300, 76.7, 'vit-b-300ep')}

def test_by_name_and_by_path(net, file, x):
    for w in ('swav_800ep', file, str(file), 'deepclusterv2_400ep'):
        enc = create_encoder('resnet50', pretrained=w)
        assert enc.made_with['arch']=='resnet50' and enc.made_with['pool_type']=='avg'
        close(enc.eval()(x), net(x))

def test_every_tensor_arrives(net, file):
    "Also what a forward pass does not show"
    theirs = {k:v for k,v in net.state_dict().items()}
    for enc in (create_encoder('resnet50', pretrained=file), create_encoder(create_timm_encoder('resnet50', pretrained=False, pool_type='avg'), file)):
        for a,b in zip(enc.state_dict().values(), theirs.values(), strict=True): assert torch.equal(a, b)

def test_order_in_the_file_does_not_matter(net, file, x, tmp_path):
    torch.save(dict(sorted(torch.load(file).items())), tmp_path/'sorted.pth')
    close(create_encoder('resnet50', pretrained=tmp_path/'sorted.pth').eval()(x), net(x))

def test_any_library(net, file, x):
    tv = torchvision.models.resnet50(weights=None)
    tv.fc = nn.Identity()
    for enc in (create_timm_encoder('resnet50', pretrained=False, pool_type='avg'), tv): close(load_official(enc, file).eval()(x), net(x))

def test_options(net, file, x):
    grey = create_encoder('resnet50', file, n_in=1).eval()
    close(grey(x[:,:1]), net(x[:,:1].expand(-1,3,-1,-1)))
    both = create_encoder('resnet50', file, pool_type='catavgmax').eval()(x)
    assert both.shape==(2,4096) and (both[:,2048:]-net(x)).abs().max()<1e-4*both.abs().max() # fastai has the maximum first
    low = create_encoder('resnet50', file, low_resolution=True)
    assert low[0].weight.shape==(64,3,3,3) and low.made_with['low_resolution']
    assert torch.allclose(low[0].weight, net.conv1.weight[:,:,2:5,2:5]*7/3)
    assert create_model('resnet50', 5, pretrained=file).eval()(x).shape==(2,5)

def test_defaults_of_other_encoders_are_as_before():
    assert create_encoder('resnet18', pretrained=False).made_with['pool_type']=='catavgmax'
    assert create_encoder('resnet10t', pretrained=False).made_with['pool_type']=='catavgmax'

def test_round_trip_through_our_file(net, file, x, tmp_path):
    model = create_official_model(file)
    learn = Learner(tensor_dls(torch.randint(0, 256, (8,3,16,16), dtype=torch.uint8), bs=4), model, cbs=SWAV(get_swav_aug_pipelines((2,1), (32,24)), [0,1], K=None))
    close(load_encoder(learn.export_encoder(tmp_path/'e.safetensors')).eval()(x), net(x))

def test_wide(x, tmp_path):
    torch.manual_seed(2)
    plain = stir(Plain(2))
    file  = write(tmp_path/'w2.pth', plain, heads(4096, 16))
    model = create_official_model(file)
    enc   = model.encoder.eval() # made by create_encoder('resnet50w2', pretrained=file)
    close(enc(x), plain(x))
    assert {k:tuple(v.shape) for k,v in enc.state_dict().items()}=={k:tuple(v.shape) for k,v in plain.state_dict().items()}
    assert model.projector[0].in_features==4096 and model.projector[0].out_features==16 and model.encoder.made_with['arch']=='resnet50w2'
    assert timm.is_model('resnet50w4')
    state = to_layout(model, 'official')
    assert {k:v.shape for k,v in state.items()}=={k:v.shape for k,v in torch.load(file).items()}
    with pytest.raises(ValueError, match='torchvision has no resnet50w2; timm has'): to_layout(model, 'torchvision')
    with pytest.raises(ValueError, match=r'layer1\.0\.conv1\.weight: \(128, 128, 1, 1\) in the file, \(64, 64, 1, 1\) here'): create_encoder('resnet50', pretrained=file)

@pytest.mark.parametrize('w,millions', [(2,94), (4,375), (5,586)])
def test_sizes_of_wide_ones(w, millions):
    with torch.device('meta'): enc,plain = create_timm_encoder(f'resnet50w{w}', pretrained=False, pool_type='avg'),Plain(w)
    assert [(k,v.shape) for k,v in enc.state_dict().items()]==[(k,v.shape) for k,v in plain.state_dict().items()]
    assert round(sum(o.numel() for o in enc.parameters())/1e6)==millions
    assert enc.feature_info[0]['num_chs']==64*w and enc(torch.empty(2,3,32,32,device='meta')).shape==(2,2048*w)

def test_plain_is_torchvisions(net, x):
    plain = Plain()
    plain.load_state_dict(net.state_dict())
    close(plain.eval()(x), net(x))

spoilt = [
    (lambda s: s.pop('module.layer3.4.bn2.running_var'), r'1 tensors differ: layer3\.4\.bn2\.running_var: is missing'),
    (lambda s: s.update({'module.extra.weight':torch.zeros(1)}), r'1 tensors differ: extra\.weight: is left over'),
    (lambda s: s.update({'module.bn1.weight':torch.zeros(65)}), r'bn1\.weight: \(65,\) in the file, \(64,\) here'),
    (lambda s: [s.pop(f'module.layer4.2.bn{i}.bias') for i in (1,2,3)], r'3 tensors differ: .*bn1\.bias.*bn2\.bias.*bn3\.bias'),
]

@pytest.mark.parametrize('lib,change,says', [('fastai',*o) for o in spoilt]+[('timm',*spoilt[3])], ids=['missing','left over','shape','several','timm'])
def test_strict(lib, change, says, file, tmp_path):
    state = torch.load(file)
    change(state)
    torch.save(state, tmp_path/'bad.pth')
    enc = create_encoder('resnet50', pretrained=False, pool_type='avg') if lib=='fastai' else create_timm_encoder('resnet50', pretrained=False, pool_type='avg')
    old = {k:v.clone() for k,v in enc.state_dict().items()}
    with pytest.raises(ValueError, match=says): load_official(enc, tmp_path/'bad.pth')
    assert all(torch.equal(v, old[k]) for k,v in enc.state_dict().items())

@pytest.mark.parametrize('f,error,says', [
    (lambda file: create_encoder('resnet18', pretrained='swav_800ep'), ValueError, r"swav_800ep holds a resnet50, not a resnet18: create_encoder\('resnet50', pretrained='swav_800ep'\)"),
    (lambda file: create_encoder('resnet50', pretrained='swav_RN50w2_400ep'), ValueError, "create_encoder\\('resnet50w2'"),
    (lambda file: create_encoder('resnet50', pretrained='swav_850ep'), ValueError, 'not a released name; did you mean swav_800ep'),
    (lambda file: create_encoder('resnet50', pretrained=file.parent), ValueError, 'is a folder without encoder.safetensors'),
    (lambda file: create_official_model('deepclusterv2_400ep', method='swav'), ValueError, r'prototypes of \[20, 20, 20\], which do not fit swav: a file with so many sets is for deepcluster or sela'),
    (lambda file: create_official_model(file, method='simclr'), ValueError, "method='simclr' must be 'swav', 'deepcluster' or 'sela'"),
    (lambda file: create_encoder('resnet50w4'), ValueError, "pretrained='swav_RN50w4_400ep'"),
    (lambda file: to_layout(nn.Sequential(nn.Conv2d(3,4,3)), 'timm'), ValueError, 'does not say what it is'),
    (lambda file: to_layout(create_encoder('xresnet18', pretrained=False), 'timm'), ValueError, 'timm has no xresnet18; neither library has'),
    (lambda file: to_layout(create_encoder('resnet18', pretrained=False), 'official'), ValueError, 'hold ResNet-50s, not a resnet18'),
    (lambda file: to_layout(create_encoder('resnet18', pretrained=False, low_resolution=True), 'timm'), ValueError, r'does not fit resnet18 in the layout timm: .*3, 3'),
    (lambda file: to_layout(create_encoder('resnet18', pretrained=False), 'jax'), ValueError, "layout='jax' must be 'torchvision', 'timm' or 'official'"),
], ids=range(12))
def test_wrong_use(f, error, says, file):
    with pytest.raises(error, match=says): f(file)

def test_without_the_module_that_knows_them(monkeypatch):
    monkeypatch.setattr(encoders, '_loaders', [])
    with pytest.raises(ValueError, match='import self_supervised.pretrained'): create_encoder('resnet50', pretrained='swav_800ep')

def test_no_network(monkeypatch):
    def fail(*args, **kwargs): raise URLError('no route')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    with pytest.raises(OSError, match=r'swav_100ep_pretrain\.pth\.tar could not be fetched \(no route\): .* pass its path, or put it into'): read_official('swav_100ep')

def test_no_network_for_imagenet_weights(monkeypatch, tmp_path):
    "Of torchvision, fastai and timm: what was wanted, where from, why not, where to put it, and how to do without"
    from huggingface_hub.errors import LocalEntryNotFoundError
    def fail(*args, **kwargs): raise URLError('no route')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    for arch,url in (('resnet18','https://download.pytorch.org/models/resnet18-.*pth'), (torchvision.models.resnet34,'https://download.pytorch.org/models/resnet34-.*pth'), ('xresnet50','https://s3.amazonaws.com/.*xrn50_940.pth')):
        for kw in ({}, dict(pretrained=True, n_in=1)):
            with pytest.raises(OSError, match=rf"ImageNet weights of {getattr(arch, '__name__', arch)} .*not on this machine, and {url} could not be fetched .no route.: .*put it into {re.escape(torch.hub.get_dir())}/checkpoints; or pass pretrained=False"): create_encoder(arch, **kw)
    asked = []
    def hub(*args, **kwargs):
        asked.append(args)
        raise LocalEntryNotFoundError('a long story') from ConnectionError('no route')
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', hub)
    for arch in ('test_vit','test_resnet'): # with and without a pooling of its own
        with pytest.raises(OSError, match=rf'weights of {arch} .*https://huggingface.co/timm/{arch}\..*/model.safetensors could not be fetched .no route.: .*pretrained_cfg_overlay=dict.file=.*; or pass pretrained=False'): create_encoder(arch)
    assert len(asked)==2
    with pytest.raises(ValueError, match='timm has no weights for test_mambaout; pass pretrained=False'): create_encoder('test_mambaout')
    monkeypatch.setattr(timm.models._factory, 'load_model_config_from_hf', hub)
    with pytest.raises(OSError, match='^a long story'): create_encoder('hf_hub:me/mine') # nobody knows what is there
    plain = timm.create_model('test_resnet')
    torch.save(plain.state_dict(), tmp_path/'fetched.pth')
    assert torch.equal(create_encoder('test_resnet', pretrained_cfg_overlay=dict(file=str(tmp_path/'fetched.pth'))).layer1[0].conv1.weight, plain.layer1[0].conv1.weight) # as that says
    with pytest.raises(FileNotFoundError): create_encoder('test_resnet', pretrained_cfg_overlay=dict(file=str(tmp_path/'not fetched.pth')))
    create_encoder('resnet18', pretrained=False)

def test_home_and_a_folder_of_a_run(monkeypatch, net, file, x, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'run').mkdir(); save_file({k:v.contiguous() for k,v in torch.load(file).items()}, tmp_path/'run'/'encoder.safetensors')
    shutil.copy(file, tmp_path/'net.safetensors') # of PyTorch, whatever it is called
    for o in ('~/run','~/run/encoder.safetensors','~/net.safetensors', tmp_path/'run'): close(create_encoder('resnet50', pretrained=o).eval()(x), net(x))
    with pytest.raises(ValueError, match=rf'{tmp_path}/run/encoder.safetensors does not fit this Sequential, nothing was loaded'): create_encoder('resnet18', pretrained='~/run')

def packed(opener, data=b'weights'):
    f = io.BytesIO()
    opener(f, data)
    return f.getvalue()
def tarred(f, data):
    with tarfile.open(fileobj=f, mode='w') as t: t.addfile(i := tarfile.TarInfo('net.pth')); i.size = 0
def zipped(f, data):
    with zipfile.ZipFile(f, 'w') as z: z.writestr('net.pth', data)

@pytest.mark.parametrize('b,says', [
    (b'',                                    'empty: delete it and fetch it again'),
    (b'\n<!DOCTYPE html>\n<title>404</title>','a web page, perhaps the error of a server.*delete it'),
    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'a pointer of Git LFS: `git lfs pull`'),
    (b'{"arch": "resnet50"}\n',              r"text \('\{.arch"),
    (packed(zipped),                         r'a ZIP archive of net\.pth: unpack it'),
    (packed(tarred),                         r'an archive \(tar\): unpack it'),
    (gzip.compress(b'weights'),              r'an archive \(gzip\): unpack it'),
    (b'\x89HDF\r\n\x1a\n'+bytes(99),        'a file of HDF5'),
    (b'\x89PNG\r\n\x1a\n'+bytes(99),        'an image'),
    (packed(lambda f,_: np.save(f, np.ones(3))), 'an array of NumPy'),
], ids=range(11))
def test_files_of_another_kind(b, says, tmp_path):
    (tmp_path/'net.pth').write_bytes(b)
    with pytest.raises(ValueError, match=rf'net\.pth holds no weights, it is ({says})'): create_encoder('resnet50', pretrained=tmp_path/'net.pth')

def test_damaged(file, tmp_path):
    (tmp_path/'cut.pth').write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(ValueError, match='cut.pth holds no weights, it is incomplete: delete it and fetch it again'): read_official(tmp_path/'cut.pth')
    rng = random.Random(0)
    for kind in (True, False): # PyTorch's two formats, a byte changed here and there: read, or said, and nothing else
        torch.save(dict(a=torch.ones(3)), f := io.BytesIO(), _use_new_zipfile_serialization=kind)
        for _ in range(60):
            b = bytearray(f.getvalue())
            for _ in range(3): b[rng.randrange(len(b))] = rng.randrange(256)
            (tmp_path/'noise.pth').write_bytes(b)
            try: assert isinstance(read_official(tmp_path/'noise.pth'), dict)
            except ValueError as e: assert 'noise.pth' in str(e)
    save_file(dict(a=torch.ones(100)), tmp_path/'whole')
    (tmp_path/'cut').write_bytes((tmp_path/'whole').read_bytes()[:200])
    for b in (bytes(range(256)), (tmp_path/'cut').read_bytes()):
        (tmp_path/'noise.pth').write_bytes(b)
        with pytest.raises(ValueError, match='is damaged, or no file of PyTorch or safetensors.*delete it'): read_official(tmp_path/'noise.pth')

@pytest.mark.parametrize('o,says', [
    (lambda: nn.Linear(2,2), r'holds Python objects \(torch\.nn\.modules\.linear\.Linear\).*model\.state_dict\(\)'),
    (lambda: dict(model=nn.Linear(2,2).state_dict(), opt={}), r"holds more than weights, it is a model and its optimizer.*learn.load\('net'\)"),
    (lambda: dict(net=nn.Linear(2,2).state_dict(), opt={}), r'holds net \(OrderedDict\), opt \(dict\), where names of tensors'),
    (lambda: torch.ones(3), 'holds Tensor, where names of tensors'),
    (lambda: [torch.ones(3)], 'holds list, where names of tensors'),
], ids=['model','fastai','other','tensor','list'])
def test_other_things_in_a_file_of_pytorch(o, says, tmp_path):
    torch.save(o(), tmp_path/'net.pth')
    with pytest.raises(ValueError, match=says): read_official(tmp_path/'net.pth')

@pytest.mark.parametrize('name', ['net.pth', 'net.safetensors', 'net'])
def test_safetensors_whatever_they_are_called(name, net, file, x, tmp_path):
    "In the layout of the released files, and as export_encoder writes them; what does not fit says what it is"
    save_file({k:v.contiguous() for k,v in torch.load(file).items()}, tmp_path/name)
    close(create_encoder('resnet50', pretrained=tmp_path/name).eval()(x), net(x))

    small = create_encoder('resnet18', pretrained=False, pool_type='avg')
    learn = Learner(tensor_dls(torch.rand(4,3,32,32), bs=2), create_simclr_model(small), loss_func=len)
    learn.export_encoder(tmp_path/'encoder.safetensors')
    shutil.copy(tmp_path/'encoder.safetensors', tmp_path/name)
    other = create_encoder('resnet18', pretrained=tmp_path/name)
    assert all(torch.equal(a, b) for a,b in zip(small.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=rf"does not fit .* export_encoder has written it, of .*'arch': 'resnet18'.*load_encoder\('.*{re.escape(name)}'\) builds"): create_encoder('resnet50', pretrained=tmp_path/name)

def test_code_in_a_file_does_not_run(files, tmp_path):
    class Evil:
        def __reduce__(self): return print, ('ran',)
    cached = files/'swav_100ep_pretrain.pth.tar' # as if it had been fetched
    for path,nm in ((tmp_path/'evil.pth', tmp_path/'evil.pth'), (cached, 'swav_100ep')):
        torch.save({'module.conv1.weight':Evil()}, path)
        with pytest.raises(ValueError, match=r'holds Python objects \(print\).*are not loaded'): read_official(nm)
    cached.unlink()

def test_checkpoint_of_a_running_training(file, tmp_path):
    torch.save({'epoch':3, 'state_dict':torch.load(file), 'optimizer':{}}, tmp_path/'checkpoint.pth.tar')
    assert read_official(tmp_path/'checkpoint.pth.tar').keys()==read_official(file).keys()

def test_whole_model_and_a_step(net, file, x):
    model,hs = create_official_model(file).eval(),{k.removeprefix('module.'):v for k,v in torch.load(file).items()}
    h = F.linear(net(x), hs['projection_head.0.weight'], hs['projection_head.0.bias'])
    h = F.relu((h-hs['projection_head.1.running_mean'])/(hs['projection_head.1.running_var']+1e-5).sqrt()*hs['projection_head.1.weight']+hs['projection_head.1.bias'])
    z = F.normalize(F.linear(h, hs['projection_head.3.weight'], hs['projection_head.3.bias']), dim=1)
    for a,b in zip(model([x]), (z, z@hs['prototypes.weight'].T)): close(a, b)
    learn = Learner(tensor_dls(torch.randint(0, 256, (8,3,32,32), dtype=torch.uint8), bs=4), model,
                    cbs=SWAV(get_swav_aug_pipelines((2,1), (32,24)), [0,1], K=None, freeze_prototypes_niters=0))
    old = {k:v.clone() for k,v in model.state_dict().items()}
    quiet(learn, 1, 1e-3)
    assert all(not torch.equal(old[k], v) for k,v in model.named_parameters())

@pytest.mark.parametrize('method,learns', [(None,False), ('sela',True)])
def test_models_of_several_heads(net, files, x, method, learns):
    "Scores of every head, a step, and the official layout again"
    file  = files/'deepclusterv2_400ep_pretrain.pth.tar'
    model,hs = create_official_model(file, method=method).eval(),torch.load(file)
    z,scores = model([x])
    for h in range(3): close(scores[:,h], z@hs[f'module.prototypes.prototypes{h}.weight'].T)
    assert model.prototypes.weight.requires_grad==learns
    again = to_layout(model, 'official')
    assert list(again)==list(hs) and all(torch.equal(again[k], hs[k]) for k in hs)
    m  = ssl_methods()['sela' if learns else 'deepcluster']
    cb = m.callback(m.get_aug_pipelines((2,1), (32,24), (.4,.1), (1.,.4)), [0,1])
    learn = Learner(tensor_dls(torch.randint(0, 256, (24,3,32,32), dtype=torch.uint8), bs=12), model, cbs=cb)
    quiet(learn, 1, 1e-3)
    assert learn.recorder.losses[-1].isfinite()

def test_name_says_the_method(files):
    (files/'selav2_400ep_pretrain.pth.tar').write_bytes((files/'deepclusterv2_400ep_pretrain.pth.tar').read_bytes())
    assert create_official_model('selav2_400ep').prototypes.weight.requires_grad
    assert not create_official_model('deepclusterv2_400ep').prototypes.weight.requires_grad

def test_heads_of_different_sizes(net, tmp_path):
    file = write(tmp_path/'x.pth', net, heads(protos=(20,10)))
    with pytest.raises(ValueError, match=r'\[20, 10\], which do not fit deepcluster'): create_official_model(file)
    with pytest.raises(ValueError, match='no projector with prototypes'): create_official_model(write(tmp_path/'y.pth', net, {}))

def test_layouts(net, file, x):
    ours = create_encoder('resnet50', file)
    want = to_layout(ours, 'torchvision')
    for wrapped in (CheckpointSequential(ours), torch.compile(ours, backend='eager')):
        got = to_layout(wrapped, 'torchvision')
        assert list(got)==list(want) and all(torch.equal(got[k], want[k]) for k in want)
    for enc in (ours, create_encoder(create_timm_encoder('resnet50', pretrained=False, pool_type='avg'), file)):
        tv = torchvision.models.resnet50(weights=None)
        assert tv.load_state_dict(to_layout(enc, 'torchvision'), strict=False)==(['fc.weight','fc.bias'], [])
        tv.fc = nn.Identity()
        tm = timm.create_model('resnet50', num_classes=0)
        tm.load_state_dict(to_layout(enc, 'timm'))
        for o in (tv, tm): close(o.eval()(x), net(x))
        assert {k:v.shape for k,v in to_layout(enc, 'official').items()}=={k:v.shape for k,v in torch.load(file).items() if not re.search('projection|prototypes', k)}

def test_official_layout_of_a_model_loads_again(net, file, x):
    buf = io.BytesIO()
    torch.save(to_layout(create_official_model(file), 'official'), buf)
    again,first = torch.load(io.BytesIO(buf.getvalue())),torch.load(file)
    assert list(again)==list(first) and all(torch.equal(again[k], first[k]) for k in first)

def test_one_set_for_a_method_of_several(file):
    "Taken if it is asked for by name; a method of several sets numbers even one"
    model = create_official_model(file, method='deepcluster')
    assert type(model) is ssl_methods()['deepcluster'].model and model.n_heads==1
    assert [k for k in to_layout(model, 'official') if 'prototypes' in k]==['module.prototypes.prototypes0.weight']

def test_method_that_is_registered_later(monkeypatch, file, tmp_path):
    "Its weights are among the released ones and say which method they are of; files of so many sets that nobody else takes are its"
    from self_supervised import methods
    from self_supervised.pretrained import OfficialWeights
    assert OfficialWeights is methods.OfficialWeights
    monkeypatch.setattr(methods, '_methods', dict(methods._methods))
    swav = ssl_methods()['swav']
    class Late(swav.callback): official_args = staticmethod(lambda n_heads: dict(bn=True) if n_heads==1 else None)
    class LateModel(swav.model): pass
    def create(*args, bn, **kwargs):
        m = swav.create_model(*args, **kwargs)
        m.__class__ = LateModel
        return m
    methods.register_method('late', Late, LateModel, create, swav.get_aug_pipelines, swav.loss, weights=dict(late_9ep=OfficialWeights('resnet50', 'Late', 9, 64, '2×224', 1., 'file:///nowhere')))
    assert list(official_weights())[-1]=='late_9ep' and len(official_weights())==23
    assert type(create_official_model(file)) is swav.model and type(create_official_model(file, method='late')) is LateModel
    with pytest.raises(ValueError, match="create_encoder\\('resnet50', pretrained='late_9ep'\\)"): create_encoder('resnet18', pretrained='late_9ep')
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url,dst,**_: shutil.copy(file, dst))
    assert type(create_official_model('late_9ep')) is LateModel

def test_layouts_of_other_architectures(x):
    for arch,layout,target in (('resnet18','torchvision',torchvision.models.resnet18), ('densenet121','torchvision',torchvision.models.densenet121)):
        enc,other = create_encoder(arch, pretrained=False, pool_type='avg').eval(),target(weights=None)
        left = other.load_state_dict(to_layout(enc, layout), strict=False)
        assert left.unexpected_keys==[] and len(left.missing_keys)==2
    enc = create_timm_encoder('test_vit', pretrained=False, n_in=1)
    other = timm.create_model('test_vit', num_classes=0, in_chans=1)
    other.load_state_dict(to_layout(enc, 'timm'))
    close(other.eval()(x[:,:1,:32,:32].repeat(1,1,5,5)), enc.eval()(x[:,:1,:32,:32].repeat(1,1,5,5)))

@pytest.mark.parametrize('kind', ['encoder','model','learner'])
def test_onnx(tmp_path, kind):
    "Another program's arithmetic gives the same features, for any number of images; batch norms are those of evaluation, and the model is left as it was"
    onnx = pytest.importorskip('onnx'); pytest.importorskip('onnxscript')
    from onnx.reference import ReferenceEvaluator
    enc = nn.Sequential(nn.Conv2d(2,4,3,stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    enc(torch.randn(8,2,9,7)+1)
    o = enc if kind=='encoder' else create_simclr_model(enc)
    if kind=='learner': o = Learner(tensor_dls(torch.rand(4,2,9,7), bs=2), o, loss_func=len)
    f = export_onnx(o, tmp_path/'new'/'e.onnx', size=(9,7))
    assert enc.training and [p.name for p in f.parent.iterdir()]==['e.onnx']
    g = onnx.load(f).graph
    assert ([i.name for i in g.input],[i.name for i in g.output])==(['images'],['features'])
    for n in (1,5):
        x = torch.randn(n,2,9,7)
        close(torch.tensor(ReferenceEvaluator(str(f)).run(None, {'images':x.numpy()})[0]), enc.eval()(x))
    enc.train()

def test_onnx_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript.*pip install 'self_supervised\[onnx\]'"): export_onnx(nn.Linear(1,1), tmp_path/'e.onnx')
    assert not list(tmp_path.iterdir())



# MoCo v3: checkpoints of its training, with student, teacher, predictor and optimizer

def mlp(name, *widths, last_bn=True):
    "Their projectors and predictors (moco/builder.py)"
    layers = [o for a,b in zip(widths, widths[1:]) for o in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())][:-2]
    if last_bn: layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return {f'{name}.{k}':v for k,v in nn.Sequential(*layers).state_dict().items()}

def write_mocov3(path, student, arch, predictor):
    "What their training saves (main_moco.py; the keys of a released file are listed in issue 545 of facebookresearch/vissl), with the state of a smaller optimizer"
    opt = torch.optim.AdamW((net := nn.Linear(2, 2)).parameters())
    net(torch.ones(1, 2)).sum().backward(); opt.step()
    state = {f'base_encoder.{k}':v for k,v in student.items()} | {f'momentum_encoder.{k}':v+1 for k,v in student.items()} | predictor
    torch.save(dict(epoch=300, arch=arch, state_dict={f'module.{k}':v for k,v in state.items()}, optimizer=opt.state_dict()), path)
    return path

def vit_state(D=384, depth=2):
    "Names and shapes of their vision transformers (vits.py), with random values that keep the features apart"
    layers = {'norm':(D,)}
    for i in range(depth): layers |= {f'blocks.{i}.{k}':v for k,v in {'norm1':(D,), 'attn.qkv':(3*D,D), 'attn.proj':(D,D), 'norm2':(D,), 'mlp.fc1':(4*D,D), 'mlp.fc2':(D,4*D)}.items()}
    shapes = {'cls_token':(1,1,D), 'pos_embed':(1,197,D), 'patch_embed.proj.weight':(D,3,16,16), 'patch_embed.proj.bias':(D,)}
    for k,v in layers.items(): shapes |= {f'{k}.weight':v, f'{k}.bias':v[:1]}
    g = torch.Generator().manual_seed(5)
    return {k:torch.randn(v, generator=g)*(2/v[-1]**.5 if len(v)==2 else .3) for k,v in shapes.items()}

def vit_by_hand(s, x, heads=12):
    "Class token after the last norm"
    def layer(nm, o): return F.linear(o, s[f'{nm}.weight'], s[f'{nm}.bias'])
    def norm(nm, o): return (o-o.mean(-1, keepdim=True))/(o.var(-1, keepdim=True, correction=0)+1e-6).sqrt()*s[f'{nm}.weight']+s[f'{nm}.bias']
    s,D = {k:v.double() for k,v in s.items()},s['cls_token'].shape[-1]
    n,_,h,w = x.shape
    patches = x.view(n,3,h//16,16,w//16,16).permute(0,2,4,1,3,5).reshape(n,-1,3*256)@s['patch_embed.proj.weight'].flatten(1).T + s['patch_embed.proj.bias']
    x,d = torch.cat([s['cls_token'].expand(n,-1,-1), patches], 1)+s['pos_embed'],D//heads
    for i in range(sum('norm1.weight' in k for k in s)):
        q,k,v = layer(f'blocks.{i}.attn.qkv', norm(f'blocks.{i}.norm1', x)).chunk(3, -1)
        x = x+layer(f'blocks.{i}.attn.proj', torch.cat([(q[...,o:o+d]@k[...,o:o+d].mT/d**.5).softmax(-1)@v[...,o:o+d] for o in range(0, D, d)], -1))
        x = x+layer(f'blocks.{i}.mlp.fc2', F.gelu(layer(f'blocks.{i}.mlp.fc1', norm(f'blocks.{i}.norm2', x))))
    return norm('norm', x)[:,0]

VIT = 'vit_small_patch16_224'

@pytest.fixture(scope='module')
def student(): return vit_state()

@pytest.fixture(scope='module')
def vit_file(files, student):
    return write_mocov3(files/'vit-s-300ep.pth.tar', student | mlp('head', 384, 16, 16, 8), 'vit_small', mlp('predictor', 8, 16, 8))

@pytest.fixture(scope='module')
def images(): return torch.randn(2, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

def exactly(a, b): torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)

def test_mocov3_resnet(files, net, x, tmp_path):
    "The student, by name and by path, for the encoders of all libraries; each batch norm as it was"
    student = {k:v for k,v in net.state_dict().items()}
    file = write_mocov3(files/'r-50-1000ep.pth.tar', student | mlp('fc', 2048, 16, 8), 'resnet50', mlp('predictor', 8, 16, 8, last_bn=False))
    for enc in (create_encoder('resnet50', pretrained='mocov3_resnet50_1000ep'), load_official(create_timm_encoder('resnet50', pretrained=False, pool_type='avg'), file)):
        for a,b in zip(enc.state_dict().values(), student.values(), strict=True): assert torch.equal(a, b)
        exactly(enc.double().eval()(x.double()), deepcopy(net).double()(x.double()))
    assert create_encoder('resnet50', pretrained=file).made_with==dict(library='fastai', arch='resnet50', n_in=3, pool_type='avg', low_resolution=False)
    with pytest.raises(ValueError, match=r'r-50-1000ep.pth.tar does not fit this Sequential, nothing was loaded.* layer1\.0\.conv3\.weight: is left over'): create_encoder('resnet18', pretrained=file)
    with pytest.raises(ValueError, match=r'mocov3_resnet50_1000ep has no projector with prototypes \(no heads at all\)'): create_official_model('mocov3_resnet50_1000ep')

@pytest.mark.parametrize('by', ['name', 'path'])
def test_mocov3_vit(by, vit_file, student, images):
    "12 heads, of the student; 6 give other features"
    enc = create_encoder(VIT, pretrained='mocov3_vits16_300ep' if by=='name' else vit_file, depth=2).double().eval()
    assert {o.num_heads for o in enc.modules() if hasattr(o, 'num_heads')}=={12} and enc.made_with['num_heads']==12
    want = vit_by_hand(student, images)
    exactly(enc(images), want)
    assert (vit_by_hand(student, images, heads=6)-want).abs().max()>.01*want.abs().max()

def test_names_of_a_whole_vit():
    "Those that timm's 12 blocks have"
    for arch,D in ((VIT, 384), ('vit_base_patch16_224', 768)):
        with torch.device('meta'): enc = create_encoder(arch, pretrained=False, num_heads=12)
        assert {k:v.shape for k,v in enc.state_dict().items()}=={k:v.shape for k,v in vit_state(D, 12).items()}

def test_mocov3_vit_of_other_images(vit_file, student, images):
    grey = create_encoder(VIT, pretrained='mocov3_vits16_300ep', depth=2, n_in=1).double().eval()
    close(grey(images[:,:1]), vit_by_hand(student, images[:,:1].expand(-1,3,-1,-1)))
    pos   = student['pos_embed']
    grid  = F.interpolate(pos[:,1:].view(1,14,14,384).permute(0,3,1,2), (4,4), mode='bicubic', antialias=True).flatten(2).mT
    small = create_encoder(VIT, pretrained=vit_file, depth=2, img_size=64).double().eval()
    x = images[...,:64,:64]
    exactly(small(x), vit_by_hand(student | dict(pos_embed=torch.cat([pos[:,:1], grid], 1)), x))

@pytest.mark.parametrize('f', [
    lambda o: create_encoder(VIT, pretrained=o, depth=2, num_heads=6),
    lambda o: load_official(create_timm_encoder(VIT, pretrained=False, depth=2), o),
    lambda o: create_encoder(timm.create_model(VIT, num_classes=0, depth=2), pretrained=o),
], ids=['asked for','made before','plain'])
@pytest.mark.parametrize('by', ['name', 'path'])
def test_mocov3_vit_of_other_heads(f, by, vit_file):
    o = 'mocov3_vits16_300ep' if by=='name' else vit_file
    with pytest.raises(ValueError, match=rf"{re.escape(str(o))} needs an encoder with num_heads=12, this VisionTransformer has num_heads=6, nothing was loaded.*as create_encoder\('{VIT}', pretrained='{re.escape(str(o))}'\) does"): f(o)

def test_other_files_of_a_vit_have_the_heads_they_had(files, student, images):
    torch.save(student, files/'dino_deitsmall16_pretrain.pth')
    for o in ('dino_vits16', files/'dino_deitsmall16_pretrain.pth'):
        exactly(create_encoder(VIT, pretrained=o, depth=2).double().eval()(images), vit_by_hand(student, images, heads=6))

def test_mocov3_vit_exported(vit_file, student, images, tmp_path):
    "Built again with as many heads"
    enc   = create_encoder(VIT, pretrained='mocov3_vits16_300ep', depth=2)
    learn = Learner(tensor_dls(torch.rand(4,3,32,32), bs=2), create_simclr_model(enc), loss_func=len)
    file  = learn.export_encoder(tmp_path/'e.safetensors')
    assert encoder_info(file)['create_encoder']['num_heads']==12
    exactly(load_encoder(file).double().eval()(images), vit_by_hand(student, images))

def test_mocov3_vit_has_no_model(vit_file):
    for o in ('mocov3_vits16_300ep', vit_file):
        with pytest.raises(ValueError, match='has no projector with prototypes'): create_official_model(o)
