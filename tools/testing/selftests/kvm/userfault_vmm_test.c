// SPDX-License-Identifier: GPL-2.0-only
/*
 * Post-copy of a guest whose memory is a guest_memfd, as a VMM does it that keeps
 * the source of the content in a process of its own:
 *
 * - The memory is one guest_memfd, mapped by the VMM, with no page in it.
 * - vCPUs stop at pages by userfault exits.
 * - Accesses by the VMM, and by KVM on behalf of the guest, go through the mapping
 *   and stop by userfaultfd.
 * - The pager, another process that was given the file and has neither the VM nor
 *   the mapping, fills pages by write().
 *
 * Whoever needs a page asks the pager for it, possibly at the same time as
 * others, and then lets those go on that it is in charge of.
 */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <linux/sizes.h>

#ifdef __x86_64__
#include <asm/kvm_para.h>
#include <asm/pvclock.h>
#include <asm/pvclock-abi.h>
#endif

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "userfaultfd_util.h"

#define NR_VCPUS		2

/* What vCPUs and the VMM read, and behind it a few pages that KVM writes to. */
#define STEAL_TIME_PAGE		NR_PAGES
#define CLOCK_PAGE		(NR_PAGES + 1)
#define ALL_PAGES		(NR_PAGES + 2)

/* KVM writes so much of such a page at most. */
#define KVM_BYTES		64

static u64 page_size;

/*
 * The pager.
 */

/* A socket for each thread that asks: the vCPUs', and userfaultfd's. */
#define NR_SOCKETS		(NR_VCPUS + 1)
#define UFFD_SOCKET		NR_VCPUS

struct answer {
	/* 0 or an errno. */
	u64 error;
};

/* Returns false at the end of the requests. */
static bool pager_serve(int sock, int fd, u64 *buf)
{
	struct answer answer = {};
	ssize_t ret;
	u64 page;

	ret = recv(sock, &page, sizeof(page), 0);
	if (ret <= 0)
		return false;

	TEST_ASSERT(ret == sizeof(page) && page < ALL_PAGES, "Bad request");
	agent_fill(buf, page_gpa(page), 1);
	ret = pwrite(fd, buf, page_size, page * page_size);
	if (ret != page_size)
		answer.error = ret < 0 ? errno : EIO;
	TEST_ASSERT(send(sock, &answer, sizeof(answer), MSG_NOSIGNAL) == sizeof(answer),
		    "send() failed, errno %d", errno);

	return true;
}

static void pager_main(int *socks)
{
	struct pollfd pollfds[NR_SOCKETS];
	u64 *buf = malloc(page_size);
	int fd, i;

	receive_fds(socks[0], &fd, 1);
	for (i = 0; i < NR_SOCKETS; i++)
		pollfds[i] = (struct pollfd) { .fd = socks[i], .events = POLLIN };

	while (poll(pollfds, NR_SOCKETS, -1) > 0) {
		for (i = 0; i < NR_SOCKETS; i++) {
			if (pollfds[i].revents && !pager_serve(socks[i], fd, buf))
				_exit(0);
		}
	}
	_exit(1);
}

FIXTURE(vmm) {
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct kvm_vm *vm;
	int fd;
	int uffd;
	u8 *hva;

	pid_t pager;
	int socks[NR_SOCKETS];

	pthread_t uffd_thread;
	atomic_bool stop;

	/* How often each page was filled, and how often userfaultfd asked for it. */
	atomic_uint nr_fills[ALL_PAGES];
	atomic_uint nr_missing[ALL_PAGES];
	atomic_uint nr_minor[ALL_PAGES];
	atomic_uint nr_exits;
};

#define vmm_data FIXTURE_DATA(vmm)

/* It starts when there is no VM yet, and so can have no part of it. */
static void start_pager(vmm_data *self)
{
	int socks[NR_SOCKETS];
	int pair[2];
	int i;

	for (i = 0; i < NR_SOCKETS; i++) {
		TEST_ASSERT(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair),
			    "socketpair() failed, errno %d", errno);
		self->socks[i] = pair[0];
		socks[i] = pair[1];
	}

	self->pager = fork();
	TEST_ASSERT(self->pager >= 0, "fork() failed, errno %d", errno);
	if (!self->pager) {
		for (i = 0; i < NR_SOCKETS; i++)
			close(self->socks[i]);
		pager_main(socks);
	}
	for (i = 0; i < NR_SOCKETS; i++)
		close(socks[i]);
}

static void stop_pager(vmm_data *self)
{
	int status, i;

	for (i = 0; i < NR_SOCKETS; i++)
		close(self->socks[i]);
	TEST_ASSERT_EQ(waitpid(self->pager, &status, 0), self->pager);
	TEST_ASSERT_EQ(status, 0);
}

/* When this returns the page is in the file, whoever put it there. */
static void request_page(vmm_data *self, int sock, u64 page)
{
	struct answer answer;

	TEST_ASSERT(send(self->socks[sock], &page, sizeof(page), MSG_NOSIGNAL) ==
		    sizeof(page), "send() failed, errno %d", errno);
	TEST_ASSERT(recv(self->socks[sock], &answer, sizeof(answer), 0) == sizeof(answer),
		    "recv() failed, errno %d", errno);
	TEST_ASSERT(!answer.error || answer.error == EEXIST,
		    "The pager failed to fill page %lu, errno %lu", page, answer.error);
	if (!answer.error)
		atomic_fetch_add(&self->nr_fills[page], 1);
}

/*
 * The VMM.
 */

static void resolve_uffd(vmm_data *self, struct uffd_msg *msg)
{
	u8 *addr = (u8 *)msg->arg.pagefault.address;
	u64 page = (addr - self->hva) / page_size;
	s64 ret;

	TEST_ASSERT_EQ(msg->event, UFFD_EVENT_PAGEFAULT);
	if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) {
		atomic_fetch_add(&self->nr_minor[page], 1);
	} else {
		atomic_fetch_add(&self->nr_missing[page], 1);
		request_page(self, UFFD_SOCKET, page);
	}

	ret = __uffd_continue(self->uffd, addr, page_size, 0);
	TEST_ASSERT(ret == page_size || ret == -EEXIST, "CONTINUE returned %ld", ret);
	if (ret < 0)
		TEST_ASSERT_EQ(__uffd_wake(self->uffd, addr, page_size), 0);
}

static void *uffd_thread(void *arg)
{
	vmm_data *self = arg;
	struct pollfd pollfd = { .fd = self->uffd, .events = POLLIN };
	struct uffd_msg msg;

	while (!atomic_load(&self->stop)) {
		if (poll(&pollfd, 1, 20) <= 0)
			continue;
		if (read(self->uffd, &msg, sizeof(msg)) == sizeof(msg))
			resolve_uffd(self, &msg);
	}

	return NULL;
}

FIXTURE_SETUP(vmm)
{
	u64 size = ALL_PAGES * page_size;

	start_pager(self);

	self->vm = agent_create_vm(VM_SHAPE_DEFAULT, NR_VCPUS, self->vcpus);
	self->fd = vm_create_guest_memfd(self->vm, size, MAPPABLE_GUEST_MEMFD_FLAGS |
							 GUEST_MEMFD_FLAG_WRITE);
	vm_mem_add(self->vm, VM_MEM_SRC_GUEST_MEMFD, AGENT_GPA, AGENT_SLOT,
		   size / self->vm->page_size, 0, self->fd, 0);
	agent_map(self->vm, AGENT_GPA, AGENT_GPA, size);
	self->hva = memslot2region(self->vm, AGENT_SLOT)->host_mem;

	send_fds(self->socks[0], &self->fd, 1);

	self->uffd = uffd_open(UFFD_FEATURE_MISSING_GUEST_MEMFD |
			       UFFD_FEATURE_MINOR_GUEST_MEMFD);
	uffd_register(self->uffd, self->hva, size,
		      UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	kvm_pthread_create(&self->uffd_thread, NULL, uffd_thread, self);

	vm_userfault_enable(self->vm);
	vm_userfault_arm(self->vm, AGENT_GPA, size);
}

FIXTURE_TEARDOWN(vmm)
{
	atomic_store(&self->stop, true);
	kvm_pthread_join(self->uffd_thread, NULL);
	stop_pager(self);
	close(self->uffd);
	close(self->fd);
	kvm_vm_free(self->vm);
}

static void resolve_exit(vmm_data *self, struct kvm_vcpu *vcpu)
{
	u64 page = (vcpu->run->memory_fault.gpa - AGENT_GPA) / page_size;

	TEST_ASSERT(page < ALL_PAGES, "Exit at gpa %#llx", vcpu->run->memory_fault.gpa);
	vcpu_assert_userfault(vcpu, page_gpa(page), USERFAULT_READ);
	atomic_fetch_add(&self->nr_exits, 1);
	request_page(self, vcpu->id, page);
	vm_userfault_clear(self->vm, page_gpa(page), page_size);
}

/* Returns how many of the pages the guest found to be wrong. */
static u64 guest_check(vmm_data *self, struct kvm_vcpu *vcpu, u64 page, u64 nr)
{
	enum agent_exit exit;

	agent_request(vcpu, AGENT_CHECK, page_gpa(page), nr);
	while ((exit = agent_run(vcpu)) == AGENT_USERFAULT)
		resolve_exit(self, vcpu);
	TEST_ASSERT_EQ(exit, AGENT_DONE);

	return agent_result(vcpu);
}

struct sweep {
	vmm_data *vmm;
	struct kvm_vcpu *vcpu;
	u64 nr_bad;
};

static void *vcpu_thread(void *arg)
{
	struct sweep *sweep = arg;

	sweep->nr_bad = guest_check(sweep->vmm, sweep->vcpu, 0, NR_PAGES);
	return NULL;
}

/* Everybody needs everything, in no particular order, at the same time. */
TEST_F_TIMEOUT(vmm, all_at_once, TEST_TIMEOUT_SECS)
{
	struct sweep sweeps[NR_VCPUS];
	pthread_t threads[NR_VCPUS];
	u64 missing = 0, i;

	for (i = 0; i < NR_VCPUS; i++) {
		sweeps[i] = (struct sweep) { .vmm = self, .vcpu = self->vcpus[i] };
		kvm_pthread_create(&threads[i], NULL, vcpu_thread, &sweeps[i]);
	}
	/* The VMM comes from the other end, for each to be the first at times. */
	for (i = NR_PAGES; i--; )
		agent_assert_content(self->hva + i * page_size, page_gpa(i), 1);

	for (i = 0; i < NR_VCPUS; i++) {
		kvm_pthread_join(threads[i], NULL);
		TEST_ASSERT_EQ(sweeps[i].nr_bad, 0);
	}

	for (i = 0; i < NR_PAGES; i++) {
		TEST_ASSERT(self->nr_fills[i] == 1, "Page %lu was filled %u times", i,
			    self->nr_fills[i]);
		/* The VMM has stopped at each page, be it filled by then or not. */
		TEST_ASSERT(self->nr_missing[i] + self->nr_minor[i],
			    "userfaultfd has not seen page %lu", i);
		missing += !!self->nr_missing[i];
	}
	TEST_ASSERT(self->nr_exits >= NR_PAGES, "%u exits for %u pages", self->nr_exits,
		    NR_PAGES);
	pr_info("# %u exits, userfaultfd saw %lu of %u pages missing\n", self->nr_exits,
		missing, NR_PAGES);
}

/* One page and one way at a time, to see what the other way has to do with it. */
TEST_F_TIMEOUT(vmm, each_way_alone, TEST_TIMEOUT_SECS)
{
	u64 i;

	TEST_ASSERT_EQ(guest_check(self, self->vcpus[0], 0, NR_PAGES / 2), 0);
	for (i = 0; i < NR_PAGES / 2; i++) {
		TEST_ASSERT_EQ(self->nr_missing[i] + self->nr_minor[i], 0);
		agent_assert_content(self->hva + i * page_size, page_gpa(i), 1);
		TEST_ASSERT_EQ(self->nr_missing[i], 0);
		TEST_ASSERT_EQ(self->nr_minor[i], 1);
	}
	TEST_ASSERT_EQ(self->nr_exits, NR_PAGES / 2);

	for (; i < NR_PAGES; i++) {
		agent_assert_content(self->hva + i * page_size, page_gpa(i), 1);
		TEST_ASSERT_EQ(self->nr_missing[i], 1);
		TEST_ASSERT_EQ(self->nr_minor[i], 0);
	}
	/* Filled, and still armed: the VMM does not release what it reads. */
	TEST_ASSERT_EQ(guest_check(self, self->vcpus[0], NR_PAGES / 2, NR_PAGES / 2), 0);
	TEST_ASSERT_EQ(self->nr_exits, NR_PAGES);

	for (i = 0; i < NR_PAGES; i++)
		TEST_ASSERT_EQ(self->nr_fills[i], 1);
}

/*
 * KVM's own accesses.
 */

#ifdef __x86_64__

static bool has_steal_time(struct kvm_vcpu *vcpu)
{
	return kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME);
}

static void enable_steal_time(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	vcpu_set_msr(vcpu, MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
}

#else

static struct kvm_device_attr steal_time_attr = {
	.group = KVM_ARM_VCPU_PVTIME_CTRL,
	.attr = KVM_ARM_VCPU_PVTIME_IPA,
};

static bool has_steal_time(struct kvm_vcpu *vcpu)
{
	return !__vcpu_ioctl(vcpu, KVM_HAS_DEVICE_ATTR, &steal_time_attr);
}

static void enable_steal_time(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	steal_time_attr.addr = (u64)&gpa;
	vcpu_ioctl(vcpu, KVM_SET_DEVICE_ATTR, &steal_time_attr);
}

#endif

/*
 * KVM wrote to a page that had no content, and has waited for it: what it did not
 * write is as it was sent.  To the guest the page is still to be released.
 */
static void assert_kvm_waited(vmm_data *self, u64 page)
{
	u64 *mem = (u64 *)(self->hva + page * page_size);
	u64 i;

	TEST_ASSERT_EQ(self->nr_fills[page], 1);
	TEST_ASSERT_EQ(self->nr_missing[page], 1);
	for (i = KVM_BYTES / sizeof(*mem); i < page_size / sizeof(*mem); i++)
		TEST_ASSERT_EQ(READ_ONCE(mem[i]), agent_page_content(page_gpa(page)));

	agent_expect_userfault(self->vcpus[1], AGENT_READ, page_gpa(page) + page_size / 2,
			       0, page_gpa(page), USERFAULT_READ);
	resolve_exit(self, self->vcpus[1]);
	TEST_ASSERT_EQ(agent_finish(self->vcpus[1]), agent_page_content(page_gpa(page)));
	TEST_ASSERT_EQ(self->nr_fills[page], 1);
}

TEST_F_TIMEOUT(vmm, steal_time, TEST_TIMEOUT_SECS)
{
	struct kvm_vcpu *vcpu = self->vcpus[0];
	gpa_t gpa = page_gpa(STEAL_TIME_PAGE);

	if (!has_steal_time(vcpu))
		SKIP(return, "There is no steal time");

	enable_steal_time(vcpu, gpa);
	TEST_ASSERT_EQ(guest_check(self, vcpu, 0, 1), 0);
	assert_kvm_waited(self, STEAL_TIME_PAGE);
}

#ifdef __x86_64__
/* KVM maps the page of the clock, for which it needs the page and not a copy. */
TEST_F_TIMEOUT(vmm, kvmclock, TEST_TIMEOUT_SECS)
{
	struct kvm_vcpu *vcpu = self->vcpus[0];
	struct pvclock_vcpu_time_info *clock;

	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW,
		     page_gpa(CLOCK_PAGE) | KVM_MSR_ENABLED);
	TEST_ASSERT_EQ(guest_check(self, vcpu, 0, 1), 0);
	assert_kvm_waited(self, CLOCK_PAGE);

	clock = (void *)(self->hva + CLOCK_PAGE * page_size);
	TEST_ASSERT(READ_ONCE(clock->tsc_to_system_mul), "KVM has not written the clock");
}
#endif

int main(int argc, char *argv[])
{
	page_size = getpagesize();

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USERFAULT));
	TEST_REQUIRE(kvm_has_guest_memfd_flags(MAPPABLE_GUEST_MEMFD_FLAGS |
					       GUEST_MEMFD_FLAG_WRITE));
	TEST_REQUIRE(has_uffd(UFFD_FEATURE_MISSING_GUEST_MEMFD |
			      UFFD_FEATURE_MINOR_GUEST_MEMFD));

	return test_harness_run(argc, argv);
}
