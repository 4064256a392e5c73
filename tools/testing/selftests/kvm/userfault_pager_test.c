// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault with a pager in a process of its own, and of what is left
 * when the pager, the VMM or a thread of it is killed.
 *
 * Pagers are started before there is a VM, so that they inherit none of its files.
 * They get the userfault file, and the memory, through a socket.
 */
#include <sched.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <linux/sizes.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"

/* The harness has no name for a test that has a limit and no fixture. */
FIXTURE(pager) {
};

FIXTURE_SETUP(pager)
{
}

FIXTURE_TEARDOWN(pager)
{
}

static u64 page_size;

/*
 * Another process, that tells how far it is by tell().
 */
struct process {
	pid_t pid;
	int sock;
};

static void process_start(struct process *process, void (*fn)(int sock, u64 arg), u64 arg)
{
	int socks[2];

	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, socks),
		    "socketpair() failed, errno %d", errno);
	process->pid = fork();
	TEST_ASSERT(process->pid >= 0, "fork() failed, errno %d", errno);
	process->sock = socks[0];
	if (!process->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		kvm_close(socks[0]);
		fn(socks[1], arg);
		_exit(0);
	}
	kvm_close(socks[1]);
}

/* Reap it, however it ends. */
static int process_wait(struct process *process)
{
	int status;

	userfault_wait_until(waitpid(process->pid, &status, WNOHANG) == process->pid);
	kvm_close(process->sock);
	return status;
}

static void process_kill(struct process *process)
{
	int status;

	TEST_ASSERT(!kill(process->pid, SIGKILL), "kill() failed, errno %d", errno);
	status = process_wait(process);
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
		    "It had died before, status %#x", status);
}

static void process_join(struct process *process)
{
	int status = process_wait(process);

	TEST_ASSERT(!status, "The other process failed, status %#x", status);
}

/*
 * A pager.
 */

/* How far a pager gets that is to be killed. */
enum pager_stop {
	STOP_NEVER,
	STOP_IDLE,		/* Does not read. */
	STOP_IN_READ,		/* Sleeps in read(), having read nothing. */
	STOP_IN_POLL,		/* Sleeps in poll(). */
	STOP_IN_EPOLL,		/* Sleeps in epoll_wait(). */
	STOP_IN_IO_URING,	/* Has asked for a record by io_uring. */
	STOP_READ,		/* Has read a record. */
	STOP_READ_ALL,		/* Has read all of them. */
	STOP_FILLED,		/* Has filled a page. */
	STOP_CLEARED,		/* Has cleared its bit and woken nobody. */
	STOP_CLEAR_ONLY,	/* Has done so by KVM_USERFAULT_CLEAR_ONLY. */
};

/* With nothing read, and nothing there to be read. */
static bool stops_asleep(u64 stop_at)
{
	return stop_at >= STOP_IN_READ && stop_at <= STOP_IN_IO_URING;
}

static void stop(int sock)
{
	tell(sock);
	for (;;)
		pause();
}

/* A predecessor may have got as far as clearing the bit: the content is there. */
static void pager_resolve(int fd, void *mem, u8 *bitmap, gpa_t gpa, u64 stop_at, int sock)
{
	u64 page = (gpa - AGENT_GPA) / page_size;
	int ret;

	TEST_ASSERT(page < NR_PAGES, "A record of page %#lx", gpa);

	if (userfault_test_bit(bitmap, page)) {
		agent_fill(mem + page * page_size, gpa, 1);
		if (stop_at == STOP_FILLED)
			stop(sock);
		if (stop_at == STOP_CLEAR_ONLY)
			userfault_resolve(fd, gpa, page_size, KVM_USERFAULT_CLEAR_ONLY, 0);
		else
			userfault_clear_bit(bitmap, page);
	}
	if (stop_at == STOP_CLEARED || stop_at == STOP_CLEAR_ONLY)
		stop(sock);

	/* Once the last bit is clear the VM may go at any time. */
	ret = __userfault_resolve(fd, gpa, page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	TEST_ASSERT(!ret || errno == ENODEV, KVM_IOCTL_ERROR(KVM_USERFAULT_RESOLVE, ret));
}

/* It is killed before there is anything. */
static void pager_sleep(int fd, u64 stop_at, int sock)
{
	struct pollfd pollfd = { .fd = fd, .events = POLLIN };
	struct epoll_event epoll_event = { .events = EPOLLIN };
	struct kvm_userfault_event event;
	struct ring ring;
	int epfd;

	switch (stop_at) {
	case STOP_IN_POLL:
		tell(sock);
		poll(&pollfd, 1, -1);
		break;
	case STOP_IN_EPOLL:
		epfd = epoll_create1(0);
		TEST_ASSERT(!epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &epoll_event),
			    "epoll_ctl() failed, errno %d", errno);
		tell(sock);
		epoll_wait(epfd, &epoll_event, 1, -1);
		break;
	case STOP_IN_IO_URING:
		TEST_ASSERT(ring_create(&ring), "There is no io_uring");
		ring_submit(&ring, IORING_OP_READ, fd, &event, sizeof(event), 0);
		ring_assert_waits(&ring);
		stop(sock);
	default:
		tell(sock);
		read(fd, &event, sizeof(event));
	}

	TEST_FAIL("It does not sleep");
}

static void pager_fn(int sock, u64 stop_at)
{
	struct kvm_userfault_event events[NR_PAGES];
	int nr = stop_at == STOP_READ_ALL ? NR_PAGES : 1;
	int fds[2], i;
	u8 *bitmap;
	void *mem;
	ssize_t ret;

	receive_fds(sock, fds, 2);
	mem = kvm_mmap(NR_PAGES * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[1]);
	bitmap = userfault_map_bitmap(fds[0], AGENT_GPA);
	if (stop_at == STOP_IDLE)
		stop(sock);
	if (stops_asleep(stop_at))
		pager_sleep(fds[0], stop_at, sock);

	while ((ret = read(fds[0], events, nr * sizeof(*events)))) {
		TEST_ASSERT(ret > 0 && !(ret % sizeof(*events)),
			    "read() returned %ld, errno %d", ret, errno);
		if (stop_at == STOP_READ || stop_at == STOP_READ_ALL)
			stop(sock);
		for (i = 0; i < ret / sizeof(*events); i++)
			pager_resolve(fds[0], mem, bitmap, events[i].gpa, stop_at, sock);
	}
}

/*
 * A VM: vCPU 0 is for accesses by the guest, the others are for accesses by KVM.
 */

#define NR_VCPUS	4

struct vm_state {
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct kvm_access accesses[NR_VCPUS];
	struct waiter runner;
	struct kvm_vm *vm;
	void *hva;
};

/* All pages are armed, and none has its content. */
static void create_vm_of(struct vm_state *state, enum vm_mem_backing_src_type src)
{
	state->vm = agent_create_vm(VM_SHAPE_DEFAULT, NR_VCPUS, state->vcpus);
	state->hva = agent_add_memory(state->vm, src, AGENT_GPA, AGENT_SLOT, NR_PAGES, 0);
	memset(state->hva, 0xee, NR_PAGES * page_size);
	vm_userfault_enable_async(state->vm, KVM_USERFAULT_ASYNC_VCPU);
	vm_userfault_arm(state->vm, AGENT_GPA, NR_PAGES * page_size);
}

static void create_vm(struct vm_state *state)
{
	create_vm_of(state, VM_MEM_SRC_SHMEM);
}

static int memory_fd(struct vm_state *state)
{
	return memslot2region(state->vm, AGENT_SLOT)->fd;
}

/* Give @process a file of its own. */
static void send_userfault_fd(struct vm_state *state, struct process *process)
{
	int fds[] = { vm_create_userfault_fd(state->vm), memory_fd(state) };

	send_fds(process->sock, fds, 2);
	kvm_close(fds[0]);
}

static void run_fn(void *arg)
{
	struct kvm_vcpu *vcpu = arg;

	TEST_ASSERT_EQ(agent_finish(vcpu), 0);
}

/* The guest reads all pages from the first one on, KVM accesses some others. */
static void start_accesses(struct vm_state *state)
{
	int i;

	agent_request(state->vcpus[0], AGENT_CHECK, AGENT_GPA, NR_PAGES / 2);
	waiter_start(&state->runner, run_fn, state->vcpus[0]);
	for (i = 1; i < NR_VCPUS; i++)
		kvm_access_start(&state->accesses[i], state->vcpus[i],
				 page_gpa(NR_PAGES - i));
	userfault_wait_until(vm_get_stat(state->vm, userfault_records) >= NR_VCPUS);
}

static void join_accesses(struct vm_state *state)
{
	int i;

	waiter_join(&state->runner);
	for (i = 1; i < NR_VCPUS; i++)
		waiter_join(&state->accesses[i].waiter);
}

userfault_test(pager, pager_in_another_process)
{
	struct vm_state state;
	struct process pager;

	process_start(&pager, pager_fn, STOP_NEVER);
	create_vm(&state);
	send_userfault_fd(&state, &pager);

	start_accesses(&state);
	join_accesses(&state);
	TEST_ASSERT_EQ(vcpu_get_stat(state.vcpus[0], userfault_exits), 0);
	TEST_ASSERT_EQ(agent_do(state.vcpus[0], AGENT_CHECK, AGENT_GPA, NR_PAGES / 2), 0);

	/* The file does not keep the VM, and the pager sees that it is gone. */
	kvm_vm_free(state.vm);
	process_join(&pager);
}

/* Killed anywhere, it is replaced by one that finds all that waits. */
static void test_successor(u64 stop_at)
{
	struct process pager, successor;
	struct vm_state state;

	process_start(&pager, pager_fn, stop_at);
	process_start(&successor, pager_fn, STOP_NEVER);
	create_vm(&state);
	send_userfault_fd(&state, &pager);

	if (!stops_asleep(stop_at))
		start_accesses(&state);
	hear(pager.sock);
	if (stops_asleep(stop_at))
		userfault_wait_until(task_state(pager.pid, pager.pid) == 'S');

	/* Before the first one goes, or the accesses fail. */
	send_userfault_fd(&state, &successor);
	process_kill(&pager);
	if (stops_asleep(stop_at))
		start_accesses(&state);

	join_accesses(&state);
	TEST_ASSERT_EQ(agent_do(state.vcpus[0], AGENT_CHECK, AGENT_GPA, NR_PAGES / 2), 0);
	kvm_vm_free(state.vm);
	process_join(&successor);
}

userfault_test(pager, pager_killed_idle)
{
	test_successor(STOP_IDLE);
}

userfault_test(pager, pager_killed_in_read)
{
	test_successor(STOP_IN_READ);
}

userfault_test(pager, pager_killed_in_poll)
{
	test_successor(STOP_IN_POLL);
}

userfault_test(pager, pager_killed_in_epoll_wait)
{
	test_successor(STOP_IN_EPOLL);
}

/* The request goes a bit later than the process, and takes no record along. */
userfault_test(pager, pager_killed_with_a_read_by_io_uring)
{
	struct ring ring;

	if (!ring_create(&ring))
		SKIP(return, "There is no io_uring");

	kvm_close(ring.fd);
	test_successor(STOP_IN_IO_URING);
}

userfault_test(pager, pager_killed_with_a_record)
{
	test_successor(STOP_READ);
}

userfault_test(pager, pager_killed_with_all_records)
{
	test_successor(STOP_READ_ALL);
}

userfault_test(pager, pager_killed_after_filling)
{
	test_successor(STOP_FILLED);
}

userfault_test(pager, pager_killed_before_waking)
{
	test_successor(STOP_CLEARED);
}

userfault_test(pager, pager_killed_after_clear_only)
{
	test_successor(STOP_CLEAR_ONLY);
}

/* To the vCPU the page is armed, whatever it contains. */
static void fill_for_vcpu(struct vm_state *state, u64 page)
{
	struct kvm_vcpu *vcpu = state->vcpus[0];
	gpa_t gpa = page_gpa(page);

	agent_expect_userfault(vcpu, AGENT_READ, gpa, 0, gpa, USERFAULT_READ);
	agent_fill(state->hva + page * page_size, gpa, 1);
	vm_userfault_clear(state->vm, gpa, page_size);
	TEST_ASSERT_EQ(agent_finish(vcpu), agent_page_content(gpa));
}

/*
 * With no pager left the guest does not get a page whose bit is set, and the VMM sees
 * why.  An access whose page was cleared goes on, though nobody was left to wake it.
 */
static void test_last_pager(u64 stop_at, int error)
{
	struct process pager;
	struct vm_state state;
	void *page;

	process_start(&pager, pager_fn, stop_at);
	create_vm(&state);
	page = state.hva + page_size;

	/* It sleeps before the pager can do anything. */
	kvm_access_start(&state.accesses[1], state.vcpus[1], page_gpa(1));
	userfault_wait_until(vm_get_stat(state.vm, userfault_records) == 1);
	waiter_assert_asleep(&state.accesses[1].waiter);
	send_userfault_fd(&state, &pager);
	hear(pager.sock);
	waiter_assert_asleep(&state.accesses[1].waiter);
	process_kill(&pager);
	waiter_join(&state.accesses[1].waiter);
	TEST_ASSERT_EQ(state.accesses[1].error, error);

	/* An access that has failed has not touched the page. */
	if (error && stop_at == STOP_FILLED)
		agent_assert_content(page, page_gpa(1), 1);
	else if (error)
		TEST_ASSERT_EQ(*(u64 *)page, 0xeeeeeeeeeeeeeeeeull);

	fill_for_vcpu(&state, 0);
	if (error)
		fill_for_vcpu(&state, 1);
	kvm_vm_free(state.vm);
}

userfault_test(pager, last_pager_killed)
{
	test_last_pager(STOP_READ_ALL, EFAULT);
}

userfault_test(pager, last_pager_killed_after_filling)
{
	test_last_pager(STOP_FILLED, EFAULT);
}

userfault_test(pager, last_pager_killed_before_waking)
{
	test_last_pager(STOP_CLEARED, 0);
}

userfault_test(pager, last_pager_killed_after_clear_only)
{
	test_last_pager(STOP_CLEAR_ONLY, 0);
}

/*
 * A VMM that is killed. This process is the pager, and holds the file.
 */

enum vmm_state {
	VMM_WAITS,		/* for pages, with no record read */
	VMM_READ_ITSELF,	/* the records, but did not resolve them */
	VMM_DELETES_SLOT,	/* while accesses wait, so the update does as well */
	VMM_ARMS,		/* behind the update that waits, which it should not */
	VMM_READS,		/* sleeps in read() itself */
	VMM_LEAVES_ITS_VM,	/* to whoever holds the guest_memfd, which keeps it */
};

static void delete_slot_fn(void *arg)
{
	vm_mem_region_delete(arg, AGENT_SLOT);
}

static void arm_fn(void *arg)
{
	vm_userfault_arm(arg, AGENT_GPA, page_size);
}

static void read_fn(void *arg)
{
	struct kvm_userfault_event event;

	while (read(*(int *)arg, &event, sizeof(event)) > 0)
		;
}

static void vmm_fn(int sock, u64 what)
{
	struct waiter waiters[2];
	struct vm_state state;
	int fds[2], i;

	create_vm_of(&state, what == VMM_LEAVES_ITS_VM ? VM_MEM_SRC_GUEST_MEMFD :
						       VM_MEM_SRC_SHMEM);
	fds[0] = vm_create_userfault_fd(state.vm);
	fds[1] = memory_fd(&state);

	start_accesses(&state);
	for (i = 0; i < NR_VCPUS; i++)
		waiter_wait_asleep(i ? &state.accesses[i].waiter : &state.runner);

	switch (what) {
	case VMM_READ_ITSELF:
		for (i = 0; i < NR_VCPUS; i++)
			vm_userfault_read(state.vm);
		break;
	case VMM_DELETES_SLOT:
	case VMM_ARMS:
		waiter_start(&waiters[0], delete_slot_fn, state.vm);
		waiter_assert_asleep(&waiters[0]);
		if (what == VMM_DELETES_SLOT)
			break;
		waiter_start(&waiters[1], arm_fn, state.vm);
		waiter_assert_asleep(&waiters[1]);
		break;
	case VMM_READS:
		waiter_start(&waiters[0], read_fn, &fds[0]);
		userfault_wait_until(userfault_get_counts(fds[0]).delivered == NR_VCPUS);
		waiter_assert_asleep(&waiters[0]);
		break;
	}

	send_fds(sock, fds, 2);
	stop(sock);
}

static void poll_fn(void *arg)
{
	TEST_ASSERT_EQ(poll(arg, 1, -1), 1);
}

static void test_vmm(u64 what, bool read_records, bool close_first)
{
	struct kvm_userfault_event event;
	struct pollfd pollfd = {};
	struct waiter poller;
	struct process vmm;
	int fds[2], i;

	process_start(&vmm, vmm_fn, what);
	receive_fds(vmm.sock, fds, 2);
	hear(vmm.sock);
	for (i = 0; read_records && i < NR_VCPUS; i++)
		userfault_read(fds[0]);
	if (close_first) {
		kvm_close(fds[0]);
		process_kill(&vmm);
		return;
	}

	/* Whoever does not care about records sleeps until the end. */
	pollfd.fd = fds[0];
	waiter_start(&poller, poll_fn, &pollfd);
	waiter_assert_asleep(&poller);
	process_kill(&vmm);

	/* Userfault goes with the process, though a bit later at times. */
	waiter_join(&poller);
	TEST_ASSERT_EQ(pollfd.revents, POLLHUP);
	pollfd.events = POLLIN;
	TEST_ASSERT_EQ(poll(&pollfd, 1, 0), 1);
	TEST_ASSERT_EQ(pollfd.revents, POLLHUP);
	TEST_ASSERT_EQ(read(fds[0], &event, sizeof(event)), 0);
	TEST_ASSERT_EQ(__userfault_resolve(fds[0], AGENT_GPA, page_size, 0, 0), -1);
	TEST_ASSERT_EQ(errno, ENODEV);
	TEST_ASSERT_EQ(userfault_get_counts(fds[0]).waiting, 0);
	kvm_close(fds[0]);
	kvm_close(fds[1]);
}

userfault_test(pager, vmm_killed_while_accesses_wait)
{
	test_vmm(VMM_WAITS, false, false);
}

userfault_test(pager, vmm_killed_with_records_read)
{
	test_vmm(VMM_WAITS, true, false);
}

userfault_test(pager, vmm_killed_with_records_read_by_itself)
{
	test_vmm(VMM_READ_ITSELF, false, false);
}

userfault_test(pager, vmm_killed_while_it_deletes_a_memslot)
{
	test_vmm(VMM_DELETES_SLOT, false, false);
}

/* What a VMM must not do while accesses wait can at least be killed. */
userfault_test(pager, vmm_killed_in_a_deadlock)
{
	test_vmm(VMM_ARMS, true, false);
}

userfault_test(pager, vmm_killed_while_it_reads)
{
	test_vmm(VMM_READS, false, false);
}

/* That there is still a VM is of no use to anybody. */
userfault_test(pager, vmm_killed_and_its_vm_kept)
{
	if (!kvm_has_mappable_guest_memfd())
		SKIP(return, "There is no guest_memfd that can be mapped");

	test_vmm(VMM_LEAVES_ITS_VM, false, false);
	test_vmm(VMM_LEAVES_ITS_VM, true, false);
}

userfault_test(pager, vmm_killed_after_the_pager_closed)
{
	test_vmm(VMM_WAITS, true, true);
}

/* So many times, with so much armed each time that a leak of the bitmap can't be missed. */
#define LEAK_ROUNDS	16
#define LEAK_START	(64ull * SZ_1G)
#define LEAK_SIZE	(256ull * SZ_1G)

static u64 available_memory(void)
{
	FILE *f = fopen("/proc/meminfo", "r");
	char line[128];
	u64 kib = 0;

	TEST_ASSERT(f, "No /proc/meminfo, errno %d", errno);
	while (!kib && fgets(line, sizeof(line), f))
		sscanf(line, "MemAvailable: %lu", &kib);
	fclose(f);
	TEST_ASSERT(kib, "There is no memory");

	return kib * SZ_1K;
}

/* Wait until all but half of what @rounds of them would leak has come back. */
static void assert_no_leak(u64 before, int rounds)
{
	u64 bitmap_size = LEAK_SIZE / page_size / 8;

	userfault_wait_until(available_memory() + rounds * bitmap_size / 2 >= before);
}

static void leaking_vmm_fn(int sock, u64 arg)
{
	struct vm_state state;
	int fds[2];

	create_vm(&state);
	vm_userfault_arm(state.vm, LEAK_START, LEAK_SIZE);
	fds[0] = vm_create_userfault_fd(state.vm);
	fds[1] = memory_fd(&state);
	start_accesses(&state);
	send_fds(sock, fds, 2);
	stop(sock);
}

/* The pager goes last, and has mapped the bitmap. */
static void kill_leaking_vmm(void)
{
	struct process vmm;
	u8 *bitmap;
	int fds[2];

	process_start(&vmm, leaking_vmm_fn, 0);
	receive_fds(vmm.sock, fds, 2);
	hear(vmm.sock);
	bitmap = userfault_map_bitmap(fds[0], LEAK_START);
	TEST_ASSERT(userfault_test_bit(bitmap, 0), "The page is not armed");
	process_kill(&vmm);
	kvm_close(fds[0]);
	kvm_close(fds[1]);
	kvm_munmap(bitmap, page_size);
}

userfault_test(pager, vmms_that_are_killed_leave_nothing)
{
	u64 before;
	int i;

	kill_leaking_vmm();
	before = available_memory();
	for (i = 0; i < LEAK_ROUNDS; i++)
		kill_leaking_vmm();
	assert_no_leak(before, LEAK_ROUNDS);
}

/* Nor does it take the end of the VM. */
userfault_test(pager, disabling_leaves_nothing)
{
	struct vm_state state;
	u64 before;
	int fd, i;

	create_vm(&state);
	before = available_memory();
	for (i = 0; i < LEAK_ROUNDS; i++) {
		vm_userfault_arm(state.vm, LEAK_START, LEAK_SIZE);
		fd = vm_create_userfault_fd(state.vm);
		vm_userfault_disable(state.vm);
		kvm_close(fd);
		vm_userfault_enable_async(state.vm, 0);
	}
	assert_no_leak(before, LEAK_ROUNDS);
	kvm_vm_free(state.vm);
}

/*
 * One thread of the VMM is killed. Threads of a process die together, so this one is
 * a process that shares the memory, and thus can use the VM.
 */

#define STACK_SIZE	SZ_128K

static int clone_access_fn(void *arg)
{
	struct kvm_access *access = arg;

	kvm_access_perform(access->vcpu, access->gpa);
	_exit(0);
}

static int clone_run_fn(void *arg)
{
	_vcpu_run(arg);
	_exit(0);
}

struct thread {
	void *stack;
	pid_t pid;
};

static void thread_start(struct thread *thread, int (*fn)(void *arg), void *arg)
{
	thread->stack = kvm_mmap(STACK_SIZE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1);
	thread->pid = clone(fn, thread->stack + STACK_SIZE, CLONE_VM | SIGCHLD, arg);
	TEST_ASSERT(thread->pid > 0, "clone() failed, errno %d", errno);
}

static void thread_kill(struct thread *thread)
{
	pid_t pid = thread->pid;
	int status;

	TEST_ASSERT(!kill(pid, SIGKILL), "errno %d", errno);
	userfault_wait_until(waitpid(pid, &status, WNOHANG) == pid);
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "Status %#x", status);
	kvm_munmap(thread->stack, STACK_SIZE);
}

enum thread_state {
	THREAD_WAITS,		/* for a page, with its record not read */
	THREAD_READ,		/* as its record was */
	THREAD_CLEARED,		/* though its page is there: nobody has woken it */
	NR_THREAD_STATES,
};

static void let_thread_get_to(struct vm_state *state, int fd, struct thread *thread,
			      enum thread_state what)
{
	userfault_wait_for_waiters(fd, 2);
	userfault_wait_until(task_is_asleep(thread->pid, thread->pid));
	waiter_assert_asleep(&state->accesses[2].waiter);
	if (what == THREAD_WAITS)
		return;

	userfault_read(fd);
	userfault_read(fd);
	if (what == THREAD_READ)
		return;

	agent_fill(state->hva, AGENT_GPA, 1);
	userfault_resolve(fd, AGENT_GPA, page_size, KVM_USERFAULT_CLEAR_ONLY, 0);
	usleep(20000);
	TEST_ASSERT(task_is_asleep(thread->pid, thread->pid), "It was woken");
}

static void test_thread(struct vm_state *state, int (*fn)(void *arg), void *arg,
			enum thread_state what)
{
	int fd = vm_create_userfault_fd(state->vm);
	struct userfault_counts counts;
	struct thread thread;

	/* Another access to the same page, which must not be touched by this. */
	kvm_access_start(&state->accesses[2], state->vcpus[2], AGENT_GPA);
	userfault_wait_for_waiters(fd, 1);

	thread_start(&thread, fn, arg);
	let_thread_get_to(state, fd, &thread, what);
	thread_kill(&thread);

	/* It took its record along. */
	counts = userfault_get_counts(fd);
	TEST_ASSERT_EQ(counts.waiting, 1);
	TEST_ASSERT_EQ(counts.pending, what == THREAD_WAITS);
	TEST_ASSERT_EQ(counts.delivered, what != THREAD_WAITS);
	waiter_assert_asleep(&state->accesses[2].waiter);

	if (what != THREAD_CLEARED)
		agent_fill(state->hva, AGENT_GPA, 1);
	userfault_resolve(fd, AGENT_GPA, page_size,
			  what == THREAD_CLEARED ? KVM_USERFAULT_WAKE_ONLY : 0, 0);
	waiter_join(&state->accesses[2].waiter);
	TEST_ASSERT_EQ(state->accesses[2].error, 0);
	kvm_close(fd);
	kvm_vm_free(state->vm);
}

userfault_test(pager, thread_killed_in_an_access_by_kvm)
{
	struct kvm_access access;
	struct vm_state state;
	int i;

	for (i = 0; i < NR_THREAD_STATES; i++) {
		create_vm(&state);
		access.vcpu = state.vcpus[1];
		access.gpa = AGENT_GPA;
		test_thread(&state, clone_access_fn, &access, i);
	}
}

userfault_test(pager, thread_killed_in_kvm_run)
{
	struct vm_state state;
	int i;

	for (i = 0; i < NR_THREAD_STATES; i++) {
		create_vm(&state);
		agent_request(state.vcpus[0], AGENT_READ, AGENT_GPA, 0);
		test_thread(&state, clone_run_fn, state.vcpus[0], i);
	}
}

/* Enough pages of the bitmap that it takes a while to allocate them. */
static u64 nr_chunks_to_arm(void)
{
	return SZ_128M / page_size;
}

static int clone_arm_fn(void *arg)
{
	u64 chunk_size = 8 * page_size * page_size;

	__vm_change_attributes(arg, 0, nr_chunks_to_arm() * chunk_size,
			       KVM_MEMORY_ATTRIBUTE_USERFAULT, KVM_MEMORY_ATTRIBUTES_SET);
	_exit(0);
}

/* It does not go on to the end of what it has begun. */
userfault_test(pager, thread_killed_while_it_arms)
{
	struct vm_state state;
	struct thread thread;
	u64 nr;

	create_vm(&state);
	nr = vm_get_stat(state.vm, userfault_bitmap_pages);
	thread_start(&thread, clone_arm_fn, state.vm);
	userfault_wait_until(vm_get_stat(state.vm, userfault_bitmap_pages) > nr + 1);
	thread_kill(&thread);

	nr = vm_get_stat(state.vm, userfault_bitmap_pages);
	TEST_ASSERT(nr < nr_chunks_to_arm(), "It has allocated all of %lu pages", nr);
	kvm_vm_free(state.vm);
}

int main(int argc, char *argv[])
{
	u64 flags = KVM_USERFAULT_ASYNC | KVM_USERFAULT_ASYNC_VCPU;

	TEST_REQUIRE((kvm_check_cap(KVM_CAP_USERFAULT) & flags) == flags);

	page_size = getpagesize();

	return test_harness_run(argc, argv);
}
