# SPDX-License-Identifier: BSD-3-Clause
# Everything a person types here. `make help` lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(wildcard tmemd/core/*.[ch] tmemd/vhost/*.[ch] tmemd/binding/*.[ch] tmemd/binding/*.pyx)
C_FILES := $(wildcard tmemd/*/*.[ch] benchmarks/*.c tests/*/*.[ch] tests/*/*/*.[ch])
SHELL_SCRIPTS = $(shell grep -IlE '^\#!(/usr)?/bin/(env ba)?sh$$' -r scripts tests benchmarks .ci --exclude='*.py' 2>/dev/null)

KILLS := 2000
HISTORIES := 100
MINUTES := 60
COUNT := 1000000
SEED := 1
REVISION := 1

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Tests start Python thousands of times: what it compiles is kept, wherever the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup build sanitize lint format test test-package test-quick test-ceph migrations deb mutants bench doors \
	remote inversion fragmentation prefetch warm slow-disk policies hitrate soak histories fuzz demo man clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*##[ ]*(.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup:  ## install what this machine lacks (Debian 12, root) and make .venv
	@scripts/setup

build: $(VENV)/built build/hog build/frontend  ## compile the C core in place
	@$(PYTHON) -m compileall -q tmemd plugin tests benchmarks

$(VENV)/built: $(SOURCES) | setup
	TMEMD_WERROR=1 $(PYTHON) setup.py -q build_ext --inplace
	@touch $@

build/hog: tests/vm/hog.c tests/support/content.h
	@mkdir -p $(@D)
	$(CC) -std=c11 -O2 -Wall -Wextra -Werror -static -o $@ $<

build/frontend: $(wildcard tests/support/frontend/*.[ch]) tests/support/content.h
	@mkdir -p $(@D)
	$(CC) -std=c11 -O2 -g -Wall -Wextra -Werror -o $@ $(filter %.c,$^)

build/lz4door: benchmarks/lz4door.c $(wildcard tmemd/vhost/*.[ch] tmemd/core/*.h)
	@mkdir -p $(@D)
	$(CC) -std=c11 -O2 -g -Wall -Wextra -Werror -pthread -Itmemd/core -Itmemd/vhost -o $@ $(filter %.c,$^) -llz4

build/fuzz: tests/vhost/fuzz.c $(wildcard tests/vhost/front.h tests/core/fixture.h tmemd/core/*.[ch] tmemd/vhost/*.[ch])
	@mkdir -p $(@D)
	$(CC) -std=c11 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,bounds-strict -pthread -Itmemd/core \
		-Itmemd/vhost -Wl,--wrap=poll -o $@ $(filter %.c,$^) -llz4 -lisal -lnbd

build/ptrace.so: tests/vm/systemd/ptrace.c
	@mkdir -p $(@D)
	$(CC) -std=c11 -O2 -Wall -Wextra -Werror -fPIC -shared -o $@ $<

build/vm/root.img: tests/vm/make-root
	@mkdir -p $(@D)
	$< $@

build/vm/bare.img: tests/vm/make-root
	@mkdir -p $(@D)
	$< --bare $@

build/vm/compiler.img: tests/vm/make-root
	@mkdir -p $(@D)
	$< $@ gcc libc6-dev make

sanitize: setup  ## instrumented builds below build/address-undefined and build/thread
	TMEMD_SANITIZE=address,undefined $(PYTHON) setup.py -q build
	TMEMD_SANITIZE=thread $(PYTHON) setup.py -q build

lint: setup  ## ruff, mypy --strict, shellcheck, clang-format
	ruff check .
	ruff format --check .
	mypy
	shellcheck $(SHELL_SCRIPTS)
	@clang-format --dry-run -Werror $(C_FILES)

format: setup  ## let ruff and clang-format rearrange the code
	ruff check --fix .
	ruff format .
	clang-format -i $(C_FILES)

test: build lint  ## lint and all tests, real guests included (seventeen minutes on two cores)
	pytest -n auto --ignore=tests/vm/test_package.py

test-package: build deb  ## install, upgrade, remove and purge the package in a Debian of its own (as root)
	pytest tests/vm/test_package.py

test-quick: build  ## without guests and what takes long (four and a half minutes on two cores)
	pytest -n auto -m 'not vm and not slow'

migrations: build  ## a guest that swaps moves from host to host ten times, in both modes (five minutes)
	MIGRATIONS=10 pytest -s tests/vm/test_migration.py

test-ceph: build  ## on a Ceph of one monitor and one OSD, which it installs and makes (root; five minutes)
	@scripts/setup ceph-common ceph-mon ceph-osd qemu-block-extra
	pytest tests/ceph

mutants: setup  ## break the code by rule and see whether the quick tests notice (hours; ARGS=--help)
	@$(PYTHON) -m tests.mutants $(ARGS)

bench: build  ## measure our device against nbdkit's own, and its doors
	@benchmarks/run
	@$(PYTHON) -m benchmarks.doors

doors: build  ## measure our doors, NBD and vhost-user-blk, against servers that do nothing (three minutes)
	@$(PYTHON) -m benchmarks.doors

remote: build  ## measure what a backing on an NBD server gives of what that server can do (two minutes)
	@$(PYTHON) -m benchmarks.remote

inversion: build  ## measure whether cold pages make room for hot ones
	@$(PYTHON) -m benchmarks.inversion

fragmentation: build  ## measure what random trims leave of a pool, against zram (as root; takes 12 GiB)
	@$(PYTHON) -m benchmarks.fragmentation

prefetch: build  ## measure what fetching ahead gains where the file is far away (two minutes)
	@$(PYTHON) -m benchmarks.prefetch

warm: build  ## measure what a list of hot pages gains a guest that has moved (three minutes)
	@$(PYTHON) -m benchmarks.warm

slow-disk: build  ## measure what a slow disk costs pages in RAM (root; a minute)
	@$(PYTHON) -m benchmarks.slow_disk

policies: setup  ## what each policy would have cost on the recorded workloads
	@$(PYTHON) -m benchmarks.compare_policies

hitrate: build  ## how often caches of equal size have what recorded guests read: ours, LRU, 2Q, ARC
	@$(PYTHON) -m benchmarks.hitrate

soak: build  ## SIGKILL plugins and tmemd again and again: make soak KILLS=2000 MINUTES=60
	@$(PYTHON) -m tests.soak --kills $(KILLS) --minutes $(MINUTES)

histories: build  ## deaths and failures in any order, on local and far files: make histories HISTORIES=100
	HISTORIES=$(HISTORIES) pytest -n auto tests/crash/test_host_death.py

fuzz: build/fuzz  ## hostile front ends and guests at the virtio door: make fuzz COUNT=1000000 SEED=1
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 build/fuzz $(COUNT) $(SEED) quiet tell
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 build/fuzz $(COUNT) $(SEED) scribble tell

demo: build  ## a real guest swaps on our device, before your eyes
	@tests/vm/run --demo virtio

deb:  ## the package for Debian, in build (make deb REVISION=1)
	@scripts/make-deb --revision $(REVISION)

man: build  ## the manual pages, below build/man
	@$(PYTHON) scripts/manpages.py build/man

clean:  ## remove what was built; .venv stays
	rm -rf build *.egg-info tmemd/binding/*.so $(VENV)/built
