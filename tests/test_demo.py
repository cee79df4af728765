"The main job, in small: one epoch on a part of the images, and one of all that is trained on labels"
import importlib.util, subprocess, sys

import pytest

import processes


@pytest.mark.slow
def test_demo(project, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('demo', project/'examples'/'demo.py')
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    ((x,y),(xt,yt)),scratch,run,asked = demo.fashion_mnist(),demo.from_scratch,subprocess.run,[]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'epochs', 1)
    monkeypatch.setattr(demo, 'fashion_mnist', lambda: ((x[:640],y[:640]), (xt,yt)))
    monkeypatch.setattr(demo, 'from_scratch', lambda train, test, n: scratch(train, test, 1))
    def _run(cmd, **kwargs): # in a process of its own all the same
        if cmd[0]!=sys.executable: return run(cmd, **kwargs)
        asked.append(cmd[1:])
        r = processes.run('-W', 'ignore', *cmd[1:])
        assert r.returncode==0, r.stderr
    monkeypatch.setattr(subprocess, 'run', _run)
    demo.main() # it compares the features of the saved encoder, loaded in another process, with those here
    assert asked==[[demo.__file__, 'features']]
    rows = (tmp_path/'demo'/'table.md').read_text().splitlines()
    assert [r.split('|')[1].strip() for r in rows[2:]]==['random encoder', 'SwAV, no labels', 'from scratch on the labels']
    assert all(0<float(c.split('±')[0])<100 for r in rows[2:] for c in r.split('|')[2:5])
    assert {o.name for o in (tmp_path/'demo').iterdir()} >= {'views.png', 'loss.png', 'monitor.png', 'prototypes.png', 'map.png', 'overview.png', 'encoder.safetensors'}
    assert not (tmp_path/'demo'/'checkpoints').exists()
    assert 'SwAV, no labels' in capsys.readouterr().out
