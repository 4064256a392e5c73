// SPDX-License-Identifier: GPL-2.0
/*
 * Holds a VM as long as the machine runs, and returns when there is one. KVM switches
 * a static key with the first and after the last VM, and under QEMU's TCG other CPUs
 * may run the code of before for a moment: a vCPU thread is then scheduled in without
 * KVM noticing.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/kvm.h>

static int hold_vm(int ready)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);

	if (kvm < 0 || vm < 0 || write(ready, "", 1) != 1) {
		perror("holdvm");
		return 1;
	}

	close(ready);
	for (;;)
		pause();
}

int main(void)
{
	int ready[2];
	char byte;

	if (pipe(ready)) {
		perror("holdvm");
		return 1;
	}

	switch (fork()) {
	case -1:
		perror("holdvm");
		return 1;
	case 0:
		return hold_vm(ready[1]);
	}

	close(ready[1]);
	return read(ready[0], &byte, 1) != 1;
}
