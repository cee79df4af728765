"The file of an encoder: what it says of itself, that it is whole, and that it holds numbers"
import json, os, re, stat
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np, pytest, timm, torch
from fastai.learner import Learner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from self_supervised.data import tensor_dls
from self_supervised.export import attention_heads, check_finite, creation_text, encoder_info, is_safetensors, load_encoder
from self_supervised.checkpoint import Checkpoint
from self_supervised.layers import create_encoder, create_timm_encoder, encoder_dim
from self_supervised.pretrained import to_layout

import methods
from methods import augs, callback, images

def learner(enc, cbs=()): return Learner(tensor_dls(images(c=3), bs=8), methods.model('swav', enc=enc, n_features=getattr(enc, 'num_features', 4)), cbs=[callback('swav', augs('swav')), *cbs])

def tiny(**kwargs): return create_encoder('vit_tiny_patch16_224', pretrained=False, pool_type='avg', depth=1, embed_dim=24, img_size=32, patch_size=2, **kwargs)

class Mine(nn.SiLU): "A layer of my own"

@pytest.mark.parametrize('kwargs', [dict(act_layer=nn.SiLU), dict(act_layer='silu'), dict(norm_layer=partial(nn.LayerNorm, eps=1e-3)), dict(act_layer=partial(nn.GELU, approximate='tanh')), dict(act_layer=timm.layers.Swish)],
                         ids=['class','name','partial','partial-2','timm'])
def test_built_with_layers(tmp_path, kwargs):
    "They are text in the header, and layers again in a new encoder"
    enc   = tiny(**kwargs)
    again = load_encoder(learner(enc).export_encoder(tmp_path/'e.safetensors'))
    assert str(again)==str(enc) and all(torch.equal(a, b) for a,b in zip(enc.state_dict().values(), again.state_dict().values()))
    x = torch.rand(2,3,32,32)
    assert torch.equal(enc.eval()(x), again.eval()(x))

@pytest.mark.parametrize('what', [Mine, lambda: nn.ReLU(), partial(Mine, inplace=True), partial(nn.Hardtanh, 0.)], ids=['class','function','partial','positional'])
def test_built_with_what_cannot_be_written(tmp_path, what):
    "The weights are written all the same, the header says why there is no more, and it is said when the fit begins"
    enc = tiny(act_layer=what)
    with pytest.warns(UserWarning, match='export_encoder will write the weights alone: .*cannot be written as text.*needs it as `encoder`'):
        learn = learner(enc, [Checkpoint(tmp_path/'run')])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    f = learn.export_encoder(tmp_path/'e.safetensors')
    info = encoder_info(f)
    assert info['create_encoder'] is None and 'cannot be written as text' in info['why_not'] and info['architecture']=='vit_tiny_patch16_224'
    with pytest.raises(ValueError, match='does not know how to build.*cannot be written.*pass it as `encoder`'): load_encoder(f)
    assert torch.equal(load_encoder(f, tiny(act_layer=what)).patch_embed.proj.weight, enc.patch_embed.proj.weight)

@pytest.mark.parametrize('nm', ['os.system', 'torch.nn.functional.relu', 'torch.nn.Module.__init__', 'timm.layers.create_act.create_act_layer', 'torch.nn.init', 'builtins.eval'])
def test_a_header_names_layers_only(tmp_path, nm):
    "of three libraries: nothing else is looked up, or called"
    from safetensors.torch import save_file
    enc  = tiny()
    made = {**json.loads(creation_text(enc)[0]), 'act_layer':{'layer':nm, 'arguments':{}}}
    save_file(enc.state_dict(), tmp_path/'x', dict(create_encoder=json.dumps(made), order=json.dumps(list(enc.state_dict()))))
    with pytest.raises(ValueError, match='there is no layer'): load_encoder(tmp_path/'x')

def test_arch_that_somebody_has_set(tmp_path):
    "`to_layout` asks for `made_with = dict(arch=…)`, which is not enough to build it"
    enc = timm.create_model('resnet18', num_classes=0); enc.made_with = dict(arch='resnet18')
    f = learner(enc).export_encoder(tmp_path/'e.safetensors')
    assert encoder_info(f)['architecture']=='resnet18' and encoder_info(f)['create_encoder'] is None
    with pytest.raises(ValueError, match='build it, and pass it'): load_encoder(f)

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('where', ['weight','buffer'])
def test_diverged(tmp_path, bad, where):
    "Is not written, and what was there stays"
    enc = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    f   = learner(enc).export_encoder(tmp_path/'e.safetensors')
    before = f.read_bytes()
    with torch.no_grad(): (enc[0].weight if where=='weight' else enc[1].running_mean)[0] = bad
    if where=='buffer' and bad==float('inf'): return check_finite(enc, 'x') # masks may be infinite
    with pytest.raises(FloatingPointError, match='the encoder has diverged: '+('0.weight' if where=='weight' else '1.running_mean')): learner(enc).export_encoder(f)
    assert f.read_bytes()==before and [o.name for o in tmp_path.iterdir()]==['e.safetensors']

@pytest.mark.skipif(os.name!='posix', reason='modes of files')
@pytest.mark.parametrize('mask', [0o022, 0o002, 0o077])
def test_mode_and_place(tmp_path, mask):
    "The mode is that of any new file; a folder is made; a write that fails leaves the old file"
    old = os.umask(mask)
    try:
        f = learner(nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())).export_encoder(tmp_path/'a'/'b'/'e.safetensors')
        (tmp_path/'other').touch()
    finally: os.umask(old)
    assert stat.S_IMODE(f.stat().st_mode)==stat.S_IMODE((tmp_path/'other').stat().st_mode)==0o666&~mask

def test_written_at_once(tmp_path, monkeypatch):
    learn = learner(nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    f = learn.export_encoder(tmp_path/'e.safetensors'); before = f.read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('full')))
    with pytest.raises(OSError): learn.export_encoder(f)
    assert f.read_bytes()==before

def test_known_by_what_it_holds(tmp_path):
    "Whatever its name is; and what is something else, or cut short, is told"
    enc = create_encoder('test_mambaout', pretrained=False, pool_type='avg')
    f   = learner(enc).export_encoder(tmp_path/'encoder.pth')
    assert is_safetensors(f) and all(torch.equal(a, b) for a,b in zip(enc.state_dict().values(), load_encoder(f).state_dict().values()))
    torch.save(enc.state_dict(), tmp_path/'x.safetensors'); (tmp_path/'empty').touch(); (tmp_path/'text').write_text('no weights')
    for nm in ('x.safetensors','empty','text'):
        assert not is_safetensors(tmp_path/nm)
        with pytest.raises(ValueError, match=f'{nm} is not a file of export_encoder'): load_encoder(tmp_path/nm)
    (tmp_path/'cut').write_bytes(f.read_bytes()[:-10])
    with pytest.raises(ValueError, match='cut is damaged.*copy it or export it again'): load_encoder(tmp_path/'cut')

def test_layout(tmp_path):
    "The header names the layout, and the command that makes the other; timm takes a file of that, and of ours not a tensor"
    ours = create_encoder('resnet18', pretrained=False, pool_type='avg')
    f    = learner(ours).export_encoder(tmp_path/'encoder.safetensors')
    assert encoder_info(f)['layout']=='ours' and encoder_info(f)['convert'].startswith('ssl_export encoder.safetensors --layout timm --out encoder.pth')
    assert not set(load_file(f)) & set(timm.create_model('resnet18').state_dict())
    torch.save(to_layout(ours, 'timm'), tmp_path/'encoder.pth')
    other = timm.create_model('resnet18', pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(file=str(tmp_path/'encoder.pth')))
    x = torch.rand(2,3,64,64)
    assert torch.allclose(other.eval()(x), ours.eval()(x), atol=1e-5)
    theirs = create_timm_encoder('resnet18', pretrained=False, pool_type='avg')
    f      = learner(theirs).export_encoder(tmp_path/'t.safetensors')
    assert encoder_info(f)['layout']=='timm'
    other  = timm.create_model('resnet18', pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(file=str(f)))
    assert torch.equal(other.conv1.weight, theirs.conv1.weight)
    own = nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert encoder_info(learner(own).export_encoder(tmp_path/'o'))['convert']=='' # nobody has names for it

def conv(): return nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def test_equal_weights_are_equal_files(tmp_path):
    "safetensors shuffles its header; other weights are another file, and what is written is read by its own reader"
    enc   = conv()
    files = [learner(enc).export_encoder(tmp_path/f'{i}'/'e.safetensors') for i in range(6)]
    assert len({o.read_bytes() for o in files})==1
    with torch.no_grad(): enc[0].weight[0,0,0,0] += 1
    assert learner(enc).export_encoder(tmp_path/'e.safetensors').read_bytes()!=files[0].read_bytes()
    b = files[0].read_bytes(); n = int.from_bytes(b[:8], 'little')
    names = list(json.loads(b[8:8+n]))
    assert n%8==0 and names==sorted(names) and all(torch.equal(load_file(tmp_path/'e.safetensors')[k], v) for k,v in enc.state_dict().items())

def test_home_and_folders(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    enc = create_encoder('test_mambaout', pretrained=False, pool_type='avg')
    f   = learner(enc).export_encoder('~/no/such/folder/encoder.safetensors')
    assert f==tmp_path/'no'/'such'/'folder'/'encoder.safetensors' and not (Path.cwd()/'~').exists()
    for o in ('~/no/such/folder/encoder.safetensors', '~/no/such/folder', str(f.parent), f):
        assert torch.equal(load_encoder(o).state_dict()['stem.conv1.weight'], enc.state_dict()['stem.conv1.weight']) and encoder_info(o)==encoder_info(f)
    with pytest.raises(ValueError, match="path='.*folder' is a folder: give the name of a file, such as .*folder/encoder.safetensors"): learner(enc).export_encoder('~/no/such/folder')
    assert [o.name for o in f.parent.iterdir()]==['encoder.safetensors']

@pytest.mark.parametrize('f', [load_encoder, encoder_info, lambda o: create_encoder('resnet50', pretrained=o)], ids=['load','info','create'])
def test_what_else_people_have(tmp_path, f):
    "A Learner, its model and optimizer, a checkpoint, folders, nothing: each is told, whatever it is called, and none is run"
    learn = learner(conv(), [Checkpoint(tmp_path/'run'/'checkpoints', epochs=1)])
    learn.path,learn.model_dir = tmp_path,tmp_path
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    learn.remove_cb(Checkpoint)
    learn.export('learner.safetensors')
    with pytest.raises(ValueError, match=r"learner.safetensors .*a whole Learner, as learn.export writes it.*can run code.*load_learner\('.*'\).export_encoder"): f(tmp_path/'learner.safetensors')
    learn.save('both')
    with pytest.raises(ValueError, match=r"both.pth .*a model and its optimizer, as learn.save.*learn.load\('both'\)"): f(tmp_path/'both.pth')
    ckpt = next((tmp_path/'run').rglob('*.ckpt'))
    for o in (ckpt, tmp_path/'run', ckpt.parent):
        with pytest.raises(ValueError, match=r"checkpoint.*Checkpoint\('.*run/checkpoints'\).newest\(\)\[1\]\['model'\].*model.encoder"): f(o)
    state = Checkpoint(ckpt.parent).newest()[1]['model'] # as that says
    assert torch.equal(state['encoder.0.weight'], learn.model.encoder[0].weight)
    (tmp_path/'run'/'settings.json').write_text('{}')
    with pytest.raises(ValueError, match=f'`ssl_export {tmp_path}/run --out encoder.safetensors`'): f(ckpt)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='empty is a folder without encoder.safetensors: pass a file'): f(tmp_path/'empty')
    with pytest.raises((FileNotFoundError,ValueError), match='gone.*(there is no such file|is not a file)'): f(tmp_path/'gone')

# Heads of attention, of which no shape tells

def vit(n, **kwargs): return create_encoder('test_vit', pretrained=False, num_heads=n, **kwargs)
def equal(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_heads_are_in_the_file(tmp_path):
    f = learner(vit(4)).export_encoder(tmp_path/'v')
    assert encoder_info(f)['attention_heads']==[4]*6 and attention_heads(load_encoder(f))==[4]*6
    for o in (conv(), create_encoder('test_resnet', pretrained=False)): assert 'attention_heads' not in encoder_info(learner(o).export_encoder(tmp_path/'c'))
    own = nn.Sequential(nn.Conv2d(3,8,16,16), nn.Flatten(2), nn.TransformerEncoderLayer(4, 2, 8), nn.Flatten(), nn.Linear(32,4))
    assert attention_heads(own)==[2] and attention_heads(torch.compile(own, backend='eager'))==[2] and attention_heads(nn.Sequential(conv(), torch.compile(vit(np.int64(2)), backend='eager')))==[2]*6

def test_other_heads_are_refused(tmp_path):
    "whatever builds the encoder that the file is to fit; nothing of it is changed"
    enc = vit(4)
    f   = learner(enc).export_encoder(tmp_path/'v')
    x   = torch.rand(2,3,160,160)
    two = vit(2); two.load_state_dict(enc.state_dict())
    assert (two.eval()(x)-enc.eval()(x)).abs().max()>1e-3 # what would come out
    says = f'{f} needs an encoder with num_heads=4, this VisionTransformer has num_heads=2, nothing was loaded.*Build it with num_heads=4'
    by_itself = re.escape(f', as load_encoder({str(f)!r}) does by itself')
    for load,more in ((lambda o: load_encoder(f, o), '$'), (lambda o: create_encoder(o, pretrained=f), by_itself), (lambda o: create_encoder('test_vit', f, pool_type='token'), by_itself)):
        for other in (vit(2), timm.create_model('test_vit', num_classes=0)):
            before = {k:v.clone() for k,v in other.state_dict().items()}
            with pytest.raises(ValueError, match=says+more): load(other)
            assert all(torch.equal(v, before[k]) for k,v in other.state_dict().items())
    for o in (load_encoder(f), load_encoder(f, vit(4)), create_encoder('test_vit', f, pool_type='token', num_heads=4), load_encoder(f, timm.create_model('test_vit', num_heads=4, num_classes=5))): assert attention_heads(o)==[4]*6 and torch.equal(o.cls_token, enc.cls_token)

def test_one_layer_of_other_heads(tmp_path):
    "also of an encoder that does not say how it was built, or that was changed since"
    enc = vit(4)
    enc.blocks[2].attn.num_heads = 2
    f = learner(enc).export_encoder(tmp_path/'v')
    for o in (None, vit(4)):
        with pytest.raises(ValueError, match=r'needs an encoder with num_heads=\(4, 2, 4\), this VisionTransformer has num_heads=4'): load_encoder(f, o)
    other = vit(4); other.blocks[3].attn.num_heads = 2
    with pytest.raises(ValueError, match=r'num_heads=\(4, 4, 2, 4, 4, 4\), this VisionTransformer has num_heads=\(4, 4, 4, 2, 4, 4\)'): load_encoder(f, other)
    assert equal(load_encoder(f, deepcopy(enc)), enc)

def test_heads_that_are_counted_twice(tmp_path):
    "by the blocks, or by the model, and those that nobody counts, as files of older versions"
    enc,none,other = vit(4),vit(2),vit(2)
    twice = deepcopy(enc)
    twice.num_heads = 4
    for o in none.modules():
        if hasattr(o, 'num_heads'): o.n_heads = o.num_heads; del o.num_heads
    f,g = learner(enc).export_encoder(tmp_path/'f'),learner(twice).export_encoder(tmp_path/'g')
    assert encoder_info(g)['attention_heads']==[4]*7
    for o in (load_encoder(f, twice), load_encoder(g, vit(4)), load_encoder(f, none)): assert equal(o, enc)
    with pytest.raises(ValueError, match='num_heads=4, this VisionTransformer has num_heads=2'): load_encoder(g, other)
    with safe_open(f, 'pt') as h: info = h.metadata()
    save_file(load_file(f), tmp_path/'old', {k:v for k,v in info.items() if k!='attention_heads'})
    for o in (load_encoder(tmp_path/'old', other), create_encoder('test_vit', tmp_path/'old', pool_type='token')): assert attention_heads(o)==[2]*6 and equal(o, enc)

def test_numbers_of_numpy(tmp_path):
    enc = create_encoder('vit_tiny_patch16_224', pretrained=False, n_in=np.int64(1), depth=1, embed_dim=24, img_size=32, patch_size=2, drop_path_rate=np.float32(0))
    f   = learner(enc).export_encoder(tmp_path/'e.safetensors')
    assert encoder_info(f)['create_encoder']['n_in']==1 and str(load_encoder(f))==str(enc)
    assert encoder_dim(enc, np.int64(32))==encoder_dim(enc, (32,32))==24
    for bad in (np.int64(0), np.float64(1), 'x'):
        with pytest.raises(ValueError, match='n_in='): create_encoder('resnet18', pretrained=False, n_in=bad)
