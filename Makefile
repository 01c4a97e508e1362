# btrfs-backup-ng: build, test, install. 'make help' lists what there is.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# Parts of the names of the tests to run; all without it.
TESTS ?=
# How long the long versions of the tests are: moments to kill at, rounds of churn.
TORTURE ?= 50
# What 'make mutants' hands on, for example MUTANTS='PLANNING GATE.StreamGate'.
MUTANTS ?=
# What 'make bench' hands on, for example BENCH='--rounds 9 full-large'.
BENCH ?= --json bench.json

ZIPAPP = btrfs_backup_ng.pyz
PROGRAM = $(DESTDIR)$(PREFIX)/bin/btrfs-backup-ng
SHARE = $(DESTDIR)$(PREFIX)/share
# The manual and the shells' completions, in the folders where man and the shells look for them.
MANUAL = $(SHARE)/man/man8/btrfs-backup-ng.8
BASH_COMPLETION = $(SHARE)/bash-completion/completions/btrfs-backup-ng
ZSH_COMPLETION = $(SHARE)/zsh/site-functions/_btrfs-backup-ng
# A root shell's fish looks nowhere below /usr/local.
FISH_FOLDER = $(if $(filter /usr/local,$(PREFIX)),$(DESTDIR)/etc/fish/completions,$(SHARE)/fish/vendor_completions.d)
FISH_COMPLETION = $(FISH_FOLDER)/btrfs-backup-ng.fish
PRINTED = '$(MANUAL)' '$(BASH_COMPLETION)' '$(ZSH_COMPLETION)' '$(FISH_COMPLETION)'
# Prints a text into a file, which any user may read.
PRINT_TO = print_to() { file=$$1; shift; install -d "$${file%/*}" && \
    "$(PYTHON)" -E -s btrfs_backup_ng.py print "$$@" >"$$file" && chmod 644 "$$file"; }
# Quoted, so that the shell does not take a pattern for file names.
RUN_TESTS = -W error::SyntaxWarning tests/run.py $(foreach pattern,$(TESTS),'$(pattern)')

# mkfs and losetup are in folders that an ordinary user's PATH often lacks.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help build demo test test-pythons test-each torture mutants bench lint install uninstall clean

help: ## list these targets
	@echo "make TARGET, with one of"
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r target text; do \
	    printf '  %-14s %s\n' "$$target" "$$text"; done

build: $(ZIPAPP) ## make btrfs_backup_ng.pyz, the program in one executable file

$(ZIPAPP): btrfs_backup_ng.py build_zipapp.sh
	./build_zipapp.sh $@

demo: ## watch the main job on scratch filesystems (as root)
	@tests/programs.sh demo
	@$(MAKE) -s build
	@"$(PYTHON)" tests/demo.py

test: ## run the tests (as root), or some: TESTS='zipapp *restore*'
	@tests/programs.sh test
	@$(MAKE) -s build
	@"$(PYTHON)" $(RUN_TESTS)

test-pythons: ## run the tests under each Python at hand, 3.6 and later
	@tests/programs.sh test
	@$(MAKE) -s build
	@failed=; for python in $$("$(PYTHON)" tests/pythons.py); do \
	    printf '\n######## %s\n\n' "$$python"; \
	    PYTHON=$$python "$$python" $(RUN_TESTS) || failed="$$failed $$python"; \
	done; \
	[ -z "$$failed" ] || { printf '\nfailed under:%s\n' "$$failed" >&2; exit 1; }

test-each: ## run the tests that need no disks, and a backup, under each Python at hand
	@tests/programs.sh test
	@$(MAKE) -s build
	@"$(PYTHON)" tests/pythons.py --each

torture: ## run the tests with their long versions: TORTURE=50
	@tests/programs.sh test
	@$(MAKE) -s build
	@TORTURE=$(TORTURE) "$(PYTHON)" $(RUN_TESTS)

# Neither the program nor its tests need what stands here.
MUTANTS_PROGRAMS = cosmic-ray==8.7.0
MUTANTS_VENV ?= .venv-mutants

mutants: $(MUTANTS_VENV)/ready ## break the pure sections in small ways, and see whether tests notice
	@nice -n 19 $(MUTANTS_VENV)/bin/python tests/mutants.py $(MUTANTS)

$(MUTANTS_VENV)/ready: Makefile
	"$(PYTHON)" -m venv $(MUTANTS_VENV)
	$(MUTANTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(MUTANTS_PROGRAMS)
	@touch $@

bench: ## measure against btrfs send | btrfs receive (as root): BENCH='--rounds 9 full-large'
	@tests/programs.sh bench
	@$(MAKE) -s build
	@"$(PYTHON)" tests/bench.py $(BENCH)

# The settings of the linters stand here, so that no file of theirs has to stand beside the program.
LINT_PYTHON ?= $(PYTHON)
LINT_PROGRAMS = ruff==0.17.6 mypy==2.4.1 vermin==1.9.2
LINT_VENV = .venv-lint
RUFF = --isolated --line-length 120 --target-version py37 --select E,F,W,B,C4,I,PIE,PLE,RET,SIM \
    --ignore SIM105,SIM115,SIM117,SIM905,RET505
MYPY = --config-file= --strict --no-warn-return-any --allow-any-generics --no-error-summary \
    --cache-dir=$(LINT_VENV)/mypy
# The tests share methods by mixins and put functions of theirs in the place of the program's.
MYPY_TESTS = --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls --no-warn-unused-ignores --no-warn-unreachable \
    --disable-error-code=attr-defined --disable-error-code=var-annotated --disable-error-code=method-assign \
    --disable-error-code=union-attr

lint: $(LINT_VENV)/ready ## check style, types and the oldest Python's syntax
	$(LINT_VENV)/bin/ruff check $(RUFF) --cache-dir=$(LINT_VENV)/ruff btrfs_backup_ng.py tests
	$(LINT_VENV)/bin/mypy $(MYPY) btrfs_backup_ng.py
	MYPYPATH=tests $(LINT_VENV)/bin/mypy $(MYPY) $(MYPY_TESTS) tests/*.py
	$(LINT_VENV)/bin/vermin --quiet --no-tips --violations --target=3.6- btrfs_backup_ng.py tests
	for script in build_zipapp.sh tests/*.sh; do sh -n "$$script" || exit 1; done

$(LINT_VENV)/ready: Makefile
	"$(LINT_PYTHON)" -m venv $(LINT_VENV)
	$(LINT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(LINT_PROGRAMS)
	@touch $@

install: build ## install program, manual and completions: PREFIX=/usr/local DESTDIR=
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 $(ZIPAPP) "$(PROGRAM)"
	@$(PRINT_TO); set -e; \
	print_to '$(MANUAL)' man; \
	print_to '$(BASH_COMPLETION)' completion bash; \
	print_to '$(ZSH_COMPLETION)' completion zsh; \
	print_to '$(FISH_COMPLETION)' completion fish

uninstall: ## remove what install has installed
	rm -f "$(PROGRAM)" $(PRINTED)

clean: ## remove what has been built
	rm -rf $(ZIPAPP) $(LINT_VENV) $(MUTANTS_VENV) .venv-release __pycache__ tests/__pycache__ bench.json
