// SPDX-License-Identifier: GPL-2.0
/*
 * Holds a VM as long as the machine runs. KVM switches a static key with the first
 * and after the last VM, and under QEMU's TCG other CPUs may run the code of before
 * for a moment: a vCPU thread is then scheduled in without KVM noticing.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/kvm.h>

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);

	if (kvm < 0 || vm < 0) {
		perror("holdvm");
		return 1;
	}

	for (;;)
		pause();
}
