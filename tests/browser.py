"""Pages in a headless Chromium, for the tests of the view explorer and of the web site; a test that needs one is skipped with a notice if there is none

    from browser import browser, new_page # the first is a fixture, which has to be imported like any other

    def test_home(browser):
        with new_page(browser, url, width=390) as page: # a page of Playwright
            assert page.title()=='Home'
        # here: no console error, no failed request, no request that left this machine
"""
import os, shutil
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

_quiet = '--no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()

def find_browser():
    "The path of an installed Chromium or Chrome, that of `CHROMIUM` first; or None"
    return next(filter(None, map(shutil.which, (os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome'))), None)

@pytest.fixture(scope='module')
def browser():
    "A headless browser for the tests of a module"
    sync_api = pytest.importorskip('playwright.sync_api', reason="NO BROWSER TESTS: Playwright is not installed (pip install 'self_supervised[dev]')")
    path = find_browser()
    if not path: pytest.skip('NO BROWSER TESTS: there is no Chromium on this machine (on Debian or Ubuntu: apt-get install chromium)')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=_quiet)
        yield b
        b.close()

class Troubles(list):
    "What went wrong on a page, a line each: console errors, exceptions of scripts, failed requests, and requests to other machines"
    def watch(self, page):
        page.on('console', lambda o: self.append(f'console: {o.text} ({o.location.get("url", "")})') if o.type=='error' else None)
        page.on('pageerror', lambda o: self.append(f'script: {o}'))
        page.on('requestfailed', lambda o: self.append(f'failed: {o.url} {o.failure}'))
        page.on('response', lambda o: self.append(f'failed: {o.url} {o.status}') if o.status>=400 else None)
        page.on('request', lambda o: self.leaves(o.url))
        page.on('websocket', lambda o: self.leaves(o.url))

    def leaves(self, url):
        u = urlsplit(url)
        if u.scheme in ('http','https','ws','wss') and u.hostname not in ('127.0.0.1','localhost'): self.append(f'left this machine: {url}')

@contextmanager
def new_page(browser, url=None, width=1400, height=900, check=True, **kwargs):
    "A page, opened at `url`, in a context of its own (`kwargs` are for it: `color_scheme`, `permissions`); with `check` any trouble fails the test at the end"
    context = browser.new_context(viewport=dict(width=width, height=height), **kwargs)
    try:
        page = context.new_page()
        page.troubles = Troubles() # for tests that expect one
        page.troubles.watch(page)
        if url: page.goto(url)
        yield page
        if check: assert not page.troubles, '\n'.join(page.troubles)
    finally: context.close()
