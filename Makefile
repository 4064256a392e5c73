# SPDX-License-Identifier: GPL-2.0
#
# KVM Userfault: the commands. Each one is a script of scripts/, where its
# header comment tells more.

.DEFAULT_GOAL := help
.PHONY: help run bench test test-long check tree export clean

export ARCH KERNEL JOBS SIZE VCPUS QUICK

help:
	@echo 'make run        migrate a running guest by KVM Userfault, and by userfaultfd, in QEMU'
	@echo 'make bench      what it costs, in instructions and in counts, against its aims'
	@echo 'make test       everything that must hold, on x86_64 and arm64 (about an hour)'
	@echo 'make test-long  all KVM selftests, unpatched kernel against patched (hours)'
	@echo 'make check      what needs no boot: checkpatch, sparse, W=1, every patch builds'
	@echo 'make tree       build/linux: a git tree with the series, to develop in'
	@echo 'make export     commits of build/linux back to patches/ and the added files'
	@echo 'make clean      remove build/, but for fetched packages and build/linux'
	@echo
	@echo 'ARCH=x86_64|arm64  architecture of make run and bench (this machine'\''s own unless given)'
	@echo 'KERNEL=DIR         a Linux 7.3.y tree to take instead of the one from Debian;'
	@echo '                   it is copied, never changed'
	@echo 'SIZE=64M VCPUS=N   memory and vCPUs of the guest of make run'
	@echo 'QUICK=y            a short make bench, for a try'
	@echo 'JOBS=N             parallel compiler jobs (all CPUs unless given)'

run:
	@scripts/run

bench:
	@scripts/bench

test:
	@scripts/test

test-long:
	@scripts/test-long

check:
	@scripts/check

tree:
	@scripts/deps && scripts/tree dev

export:
	@scripts/export

clean:
	@scripts/clean
