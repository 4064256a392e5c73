// SPDX-License-Identifier: GPL-2.0-only
/*
 * Helpers for tests of KVM Userfault.
 */
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"

struct agent_request {
	u64 op;
	u64 gva;
	u64 arg;
	u64 page_size;
	u64 result;
	/* Of the request, and of the last one that was finished. */
	u64 seq;
	u64 done;
	bool spinning;
};

/* Each VM has its own copy, which is the mailbox between host and guest. */
static struct agent_request requests[AGENT_MAX_VCPUS];

static struct agent_request *agent_mailbox(struct kvm_vcpu *vcpu)
{
	TEST_ASSERT(vcpu->id < AGENT_MAX_VCPUS, "No mailbox for vCPU %u", vcpu->id);

	return addr_gva2hva(vcpu->vm, (gva_t)&requests[vcpu->id]);
}

/*
 * Unlike any value that a page that was never filled can hold by chance, and
 * unlike that of any other page.
 */
u64 agent_page_content(gva_t gva)
{
	return (gva ^ 0x5bd1e9955bd1e995ull) * 0x9e3779b97f4a7c15ull;
}

void agent_fill(void *hva, gva_t gva, u64 nr_pages)
{
	u64 page_size = getpagesize();
	u64 i, j;

	for (i = 0; i < nr_pages; i++) {
		u64 content = agent_page_content(gva + i * page_size);
		u64 *page = hva + i * page_size;

		for (j = 0; j < page_size / sizeof(*page); j++)
			WRITE_ONCE(page[j], content);
	}
}

void agent_assert_content(void *hva, gva_t gva, u64 nr_pages)
{
	u64 size = nr_pages * getpagesize();
	u64 *expected = malloc(size);
	u64 *words = hva;
	u64 i;

	TEST_ASSERT(expected, "Out of memory");
	agent_fill(expected, gva, nr_pages);

	for (i = 0; i < size / sizeof(*words); i++)
		TEST_ASSERT(READ_ONCE(words[i]) == expected[i],
			    "Word at %#lx: expected %#lx, got %#lx",
			    gva + i * sizeof(*words), expected[i], words[i]);

	free(expected);
}

static bool guest_page_is_intact(u64 *page, u64 page_size)
{
	u64 content = agent_page_content((gva_t)page);
	u64 nr = page_size / sizeof(*page);
	u64 i;

	/* A word per cache line will do, and the last one. */
	for (i = 0; i < nr; i += 8) {
		if (READ_ONCE(page[i]) != content)
			return false;
	}

	return READ_ONCE(page[nr - 1]) == content;
}

static u64 guest_check(struct agent_request *req)
{
	u64 bad = 0;
	u64 i;

	for (i = 0; i < req->arg; i++) {
		if (!guest_page_is_intact((void *)req->gva + i * req->page_size,
					  req->page_size))
			bad++;
	}

	return bad;
}

static u64 guest_spin(struct agent_request *req)
{
	u64 initial = req->arg;
	u64 val;

	do {
		val = READ_ONCE(*(u64 *)req->gva);
		if (!READ_ONCE(req->spinning))
			WRITE_ONCE(req->spinning, true);
	} while (val == initial);

	WRITE_ONCE(req->spinning, false);
	return val;
}

static u64 guest_serve(struct agent_request *req)
{
	switch (req->op) {
	case AGENT_READ:
		return READ_ONCE(*(u64 *)req->gva);
	case AGENT_WRITE:
		WRITE_ONCE(*(u64 *)req->gva, req->arg);
		return 0;
	case AGENT_EXEC:
		return ((u64 (*)(u64))req->gva)(req->arg);
	case AGENT_CHECK:
		return guest_check(req);
	case AGENT_SPIN:
		return guest_spin(req);
	default:
		GUEST_FAIL("Unknown operation %lu", req->op);
		return 0;
	}
}

void agent_guest_code(u32 vcpu_id)
{
	struct agent_request *req = &requests[vcpu_id];

	for (;;) {
		WRITE_ONCE(req->result, guest_serve(req));
		WRITE_ONCE(req->done, READ_ONCE(req->seq));
		GUEST_SYNC(0);
	}
}

/*
 * Position independent, and so small that its code can be copied without
 * knowing its size.
 */
static noinline u64 guest_payload(u64 arg)
{
	return arg * 3 + 1;
}

#define PAYLOAD_SIZE	64

void agent_put_code(void *hva)
{
	memcpy(hva, guest_payload, PAYLOAD_SIZE);
	__builtin___clear_cache(hva, hva + PAYLOAD_SIZE);
}

struct kvm_vm *agent_create_vm(struct vm_shape shape, u32 nr_vcpus,
			       struct kvm_vcpu *vcpus[])
{
	struct kvm_vm *vm;
	u32 i;

	vm = __vm_create_with_vcpus(shape, nr_vcpus, 0, agent_guest_code, vcpus);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_args_set(vcpus[i], 1, i);

	return vm;
}

void agent_request(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva, u64 arg)
{
	struct agent_request *req = agent_mailbox(vcpu);

	TEST_ASSERT(req->done == req->seq,
		    "Test bug, vCPU %u has not finished its last access", vcpu->id);

	req->op = op;
	req->gva = gva;
	req->arg = arg;
	req->page_size = getpagesize();
	req->spinning = false;
	req->seq++;
}

/* Whether an access is requested, and not performed yet. */
bool agent_is_busy(struct kvm_vcpu *vcpu)
{
	struct agent_request *req = agent_mailbox(vcpu);

	return req->done != req->seq;
}

/* Whether AGENT_SPIN has read its word at least once. */
bool agent_is_spinning(struct kvm_vcpu *vcpu)
{
	return READ_ONCE(agent_mailbox(vcpu)->spinning);
}

enum agent_exit agent_run(struct kvm_vcpu *vcpu)
{
	struct agent_request *req;
	struct ucall uc;
	int ret;

	ret = _vcpu_run(vcpu);
	if (vcpu_has_userfault(vcpu, ret))
		return AGENT_USERFAULT;

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_RUN, ret));

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		/* Not any earlier: the page tables that lead there may be missing. */
		req = agent_mailbox(vcpu);
		TEST_ASSERT_EQ(req->done, req->seq);
		return AGENT_DONE;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
		break;
	default:
		break;
	}

	return AGENT_OTHER;
}

static const char *agent_exit_str(struct kvm_vcpu *vcpu, enum agent_exit exit)
{
	switch (exit) {
	case AGENT_DONE:
		return "no exit";
	case AGENT_USERFAULT:
		return "a userfault exit";
	default:
		return exit_reason_str(vcpu->run->exit_reason);
	}
}

/*
 * Fail because of what KVM_RUN did.  The registers tell a guest that ran into a
 * triple fault from a vCPU that was reset by somebody else.
 */
void vcpu_fail_run(struct kvm_vcpu *vcpu, int ret, const char *expected)
{
	int saved_errno = errno;

	vcpu_dump(stderr, vcpu, 2);
	if (vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT)
		fprintf(stderr, "memory fault: gpa %#llx, flags %#llx\n",
			vcpu->run->memory_fault.gpa, vcpu->run->memory_fault.flags);
	TEST_FAIL("vCPU %u: expected %s, KVM_RUN returned %d, errno %d (%s), exit %s",
		  vcpu->id, expected, ret, saved_errno, strerror(saved_errno),
		  exit_reason_str(vcpu->run->exit_reason));
}

/* The result of the last access, which agent_run() says is performed. */
u64 agent_result(struct kvm_vcpu *vcpu)
{
	return agent_mailbox(vcpu)->result;
}

/* Run until the access is performed, which nothing must prevent. */
u64 agent_finish(struct kvm_vcpu *vcpu)
{
	enum agent_exit exit = agent_run(vcpu);

	if (exit == AGENT_OTHER)
		vcpu_dump(stderr, vcpu, 2);

	TEST_ASSERT(exit == AGENT_DONE,
		    "The access to %#lx (operation %lu) got %s, gpa %#llx",
		    agent_mailbox(vcpu)->gva, agent_mailbox(vcpu)->op,
		    agent_exit_str(vcpu, exit), vcpu->run->memory_fault.gpa);

	return agent_result(vcpu);
}

/* Perform an access that must not leave the guest. */
u64 agent_do(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva, u64 arg)
{
	agent_request(vcpu, op, gva, arg);
	return agent_finish(vcpu);
}

void vcpu_assert_userfault(struct kvm_vcpu *vcpu, gpa_t gpa, u64 flags)
{
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.flags, flags);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.gpa, gpa);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.size, getpagesize());
}

/* Run on: the access that is under way must report exactly this page. */
void vcpu_run_expect_userfault(struct kvm_vcpu *vcpu, gpa_t gpa, u64 flags)
{
	int ret = _vcpu_run(vcpu);

	if (!vcpu_has_userfault(vcpu, ret))
		vcpu_fail_run(vcpu, ret, "a userfault exit");
	vcpu_assert_userfault(vcpu, gpa, flags);
}

void agent_expect_userfault(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva,
			    u64 arg, gpa_t gpa, u64 flags)
{
	agent_request(vcpu, op, gva, arg);
	vcpu_run_expect_userfault(vcpu, gpa, flags);
}

/* Perform an access that must be MMIO, and complete it. */
void agent_expect_mmio(struct kvm_vcpu *vcpu, enum agent_op op, gva_t gva,
		       u64 arg, gpa_t gpa)
{
	enum agent_exit exit;

	agent_request(vcpu, op, gva, arg);
	exit = agent_run(vcpu);
	TEST_ASSERT(exit == AGENT_OTHER, "Expected MMIO, got %s",
		    agent_exit_str(vcpu, exit));
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT_EQ(vcpu->run->mmio.phys_addr, gpa);
	TEST_ASSERT_EQ(vcpu->run->mmio.is_write, op == AGENT_WRITE);
	agent_finish(vcpu);
}

/*
 * Read a word: return whether that reported a userfault.  In that case the page
 * is cleared and the read finished, so each page can be probed once.
 */
bool agent_probe(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa, u64 flags)
{
	agent_request(vcpu, AGENT_READ, gva, 0);

	switch (agent_run(vcpu)) {
	case AGENT_DONE:
		return false;
	case AGENT_USERFAULT:
		vcpu_assert_userfault(vcpu, gpa, flags);
		vm_userfault_clear(vcpu->vm, gpa, getpagesize());
		agent_finish(vcpu);
		return true;
	default:
		vcpu_fail_run(vcpu, 0, "a read, or a userfault exit");
		return false;
	}
}

/* Huge pages have to be reserved, which is up to whoever runs the test. */
bool has_hugetlb(u64 size, u64 nr)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
		    ilog2(size) << MAP_HUGE_SHIFT;
	void *mem;

	mem = mmap(NULL, nr * size, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (mem == MAP_FAILED)
		return false;

	kvm_munmap(mem, nr * size);
	return true;
}

/* Whether the host has transparent huge pages for all of [@hva, @hva + @size). */
bool is_thp(void *hva, u64 size)
{
	u64 start, end, kib = 0;
	bool found = false;
	char line[256];
	FILE *f;

	f = fopen("/proc/self/smaps", "r");
	TEST_ASSERT(f, "Cannot open /proc/self/smaps");

	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			found = (u64)hva >= start && (u64)hva + size <= end;
		else if (found && sscanf(line, "AnonHugePages: %lu kB", &kib) == 1)
			break;
	}
	fclose(f);

	return kib * SZ_1K >= size;
}

void agent_map(struct kvm_vm *vm, gva_t gva, gpa_t gpa, u64 size)
{
#ifdef __x86_64__
	u64 all = gva | gpa | size;

	/*
	 * With shadow paging KVM maps no larger than the guest does.  Other than
	 * that, huge mappings of 1 GiB merely save page tables.
	 */
	if (!(all & (SZ_1G - 1)))
		return virt_map_level(vm, gva, gpa, size, PG_LEVEL_1G);
	if (!(all & (SZ_2M - 1)) && !kvm_is_tdp_enabled())
		return virt_map_level(vm, gva, gpa, size, PG_LEVEL_2M);
#endif
	virt_map(vm, gva, gpa, size / vm->page_size);
}

/*
 * Add memory at @gpa, mapped at the same virtual address and filled with the
 * content that AGENT_CHECK expects.  Returns its host virtual address.
 */
void *agent_add_memory(struct kvm_vm *vm, enum vm_mem_backing_src_type src,
		       gpa_t gpa, u32 slot, u64 nr_pages, u32 flags)
{
	u64 size = nr_pages * getpagesize();
	void *hva;

	vm_userspace_mem_region_add(vm, src, gpa, slot, size / vm->page_size,
				    flags);
	agent_map(vm, gpa, gpa, size);

	hva = memslot2region(vm, slot)->host_mem;
	agent_fill(hva, gpa, nr_pages);

	return hva;
}

/* Pass files to another process by a Unix socket. */
void send_fds(int sock, int *fds, int nr)
{
	u8 control[CMSG_SPACE(MAX_SENT_FDS * sizeof(int))] = {};
	struct iovec iov = { .iov_base = "", .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = CMSG_SPACE(nr * sizeof(int)),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	TEST_ASSERT(nr <= MAX_SENT_FDS, "Too many files");
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(nr * sizeof(int));
	memcpy(CMSG_DATA(cmsg), fds, nr * sizeof(int));
	TEST_ASSERT(sendmsg(sock, &msg, 0) == 1, "sendmsg() failed, errno %d", errno);
}

void receive_fds(int sock, int *fds, int nr)
{
	u8 control[CMSG_SPACE(MAX_SENT_FDS * sizeof(int))] = {};
	char byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg;

	TEST_ASSERT(recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) == 1,
		    "recvmsg() failed, errno %d", errno);
	cmsg = CMSG_FIRSTHDR(&msg);
	TEST_ASSERT(cmsg && cmsg->cmsg_type == SCM_RIGHTS &&
		    cmsg->cmsg_len == CMSG_LEN(nr * sizeof(int)),
		    "There are not %d files in the message", nr);
	memcpy(fds, CMSG_DATA(cmsg), nr * sizeof(int));
}

/* A buffer of our own, or NULL if tracefs is in neither place, or not for us. */
const char *trace_create(void)
{
	static const char * const roots[] = {
		"/sys/kernel/tracing",
		"/sys/kernel/debug/tracing",
	};
	static char dir[128];
	int i;

	for (i = 0; i < ARRAY_SIZE(roots); i++) {
		snprintf(dir, sizeof(dir), "%s/instances/userfault_test.%d", roots[i],
			 getpid());
		if (!mkdir(dir, 0700))
			return dir;

		TEST_ASSERT(errno == ENOENT || errno == EACCES || errno == EPERM,
			    "Cannot create %s, errno %d", dir, errno);
	}

	return NULL;
}

void trace_remove(const char *dir)
{
	TEST_ASSERT(!rmdir(dir), "rmdir() of %s failed, errno %d", dir, errno);
}

FILE *trace_open(const char *dir, const char *name, const char *mode)
{
	char path[256];
	FILE *file;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	file = fopen(path, mode);
	TEST_ASSERT(file, "Cannot open %s, errno %d", path, errno);
	return file;
}

void trace_write(const char *dir, const char *name, int value)
{
	FILE *file = trace_open(dir, name, "w");

	fprintf(file, "%d", value);
	TEST_ASSERT(!fclose(file), "Cannot write to %s, errno %d", name, errno);
}

/* A VM with one vCPU and @nr_pages of such memory, ready for userfaults. */
struct kvm_vm *agent_create_vm_with_memory(enum vm_mem_backing_src_type src,
					   u64 nr_pages, struct kvm_vcpu **vcpu)
{
	struct kvm_vm *vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, vcpu);

	agent_add_memory(vm, src, AGENT_GPA, AGENT_SLOT, nr_pages, 0);
	vm_userfault_enable(vm);

	return vm;
}

int __vm_create_userfault_fd(struct kvm_vm *vm)
{
	struct kvm_create_userfault_fd create = {};

	return __vm_ioctl(vm, KVM_CREATE_USERFAULT_FD, &create);
}

int vm_create_userfault_fd(struct kvm_vm *vm)
{
	int fd = __vm_create_userfault_fd(vm);

	TEST_ASSERT(fd >= 0, KVM_IOCTL_ERROR(KVM_CREATE_USERFAULT_FD, fd));
	return fd;
}

void *userfault_map_bitmap(int fd, gpa_t gpa)
{
	u64 page_size = getpagesize();
	u64 offset = gpa / page_size / 8;

	return __kvm_mmap(page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			  offset & ~(page_size - 1)) + offset % page_size;
}

struct userfault_counts userfault_get_counts(int fd)
{
	struct userfault_counts counts;
	char path[64], line[128];
	int nr = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "r");
	TEST_ASSERT(file, "Cannot open %s, errno %d", path, errno);

	while (fgets(line, sizeof(line), file)) {
		nr += sscanf(line, "pending:\t%u", &counts.pending) == 1;
		nr += sscanf(line, "delivered:\t%u", &counts.delivered) == 1;
		nr += sscanf(line, "waiting:\t%u", &counts.waiting) == 1;
	}
	fclose(file);

	TEST_ASSERT(nr == 3, "%s has %d of 3 counts", path, nr);
	return counts;
}

void userfault_wait_for_waiters(int fd, unsigned int nr)
{
	userfault_wait_until(userfault_get_counts(fd).waiting == nr);
}

bool userfault_is_readable(int fd, int timeout_ms)
{
	struct pollfd pollfd = {
		.fd = fd,
		.events = POLLIN,
	};
	int ret = poll(&pollfd, 1, timeout_ms);

	TEST_ASSERT(ret >= 0, "poll() failed, errno %d", errno);
	return ret && pollfd.revents & POLLIN;
}

struct kvm_userfault_event userfault_read(int fd)
{
	struct kvm_userfault_event event;

	TEST_ASSERT(userfault_is_readable(fd, USERFAULT_TIMEOUT_SECS * 1000),
		    "There is no record");
	TEST_ASSERT_EQ(read(fd, &event, sizeof(event)), sizeof(event));
	return event;
}

struct kvm_userfault_event vm_userfault_read(struct kvm_vm *vm)
{
	struct kvm_userfault_event event;
	int ret;

	userfault_wait_until(!(ret = __vm_ioctl(vm, KVM_READ_USERFAULT, &event)) ||
			     errno != ENOENT);
	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_READ_USERFAULT, ret));
	return event;
}

u64 userfault_now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return timespec_to_ns(ts) / 1000000;
}

static void *waiter_thread(void *arg)
{
	struct waiter *waiter = arg;

	WRITE_ONCE(waiter->tid, kvm_gettid());
	waiter->fn(waiter->arg);
	__atomic_store_n(&waiter->done, true, __ATOMIC_RELEASE);
	return NULL;
}

void waiter_start(struct waiter *waiter, void (*fn)(void *arg), void *arg)
{
	waiter->fn = fn;
	waiter->arg = arg;
	waiter->tid = 0;
	waiter->done = false;
	kvm_pthread_create(&waiter->thread, NULL, waiter_thread, waiter);
}

bool waiter_is_done(struct waiter *waiter)
{
	return __atomic_load_n(&waiter->done, __ATOMIC_ACQUIRE);
}

/* As in /proc: R, S, D ..., or 0 if there is no such thread. */
char task_state(pid_t pid, pid_t tid)
{
	char path[64], line[512], state = 0;
	char *end;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
	file = fopen(path, "r");
	if (!file)
		return 0;

	/* The name, which is in parentheses, can be anything. */
	if (fgets(line, sizeof(line), file)) {
		end = strrchr(line, ')');
		if (end && end[1])
			state = end[2];
	}
	fclose(file);

	return state;
}

bool task_is_asleep(pid_t pid, pid_t tid)
{
	char state = task_state(pid, tid);

	return state == 'S' || state == 'D';
}

static bool waiter_is_asleep(struct waiter *waiter)
{
	pid_t tid = READ_ONCE(waiter->tid);

	return tid && task_is_asleep(getpid(), tid);
}

/* For a waiter that is in line, as is seen by its record: it goes nowhere any more. */
void waiter_wait_asleep(struct waiter *waiter)
{
	userfault_wait_until(waiter_is_asleep(waiter));
}

/* If it was woken, it has had time enough to do what comes next. */
void waiter_assert_asleep(struct waiter *waiter)
{
	usleep(20000);
	waiter_wait_asleep(waiter);
	TEST_ASSERT(!waiter_is_done(waiter), "An access did not wait");
}

void waiter_join(struct waiter *waiter)
{
	userfault_wait_until(waiter_is_done(waiter));
	kvm_pthread_join(waiter->thread, NULL);
}

void vcpu_call_run_fn(void *arg)
{
	struct vcpu_call *call = arg;

	call->ret = _vcpu_run(call->vcpu);
	call->error = errno;
}

void tell(int sock)
{
	TEST_ASSERT(send(sock, "", 1, MSG_NOSIGNAL) == 1, "The other process died");
}

void hear(int sock)
{
	struct pollfd pollfd = { .fd = sock, .events = POLLIN };
	char byte;

	TEST_ASSERT(poll(&pollfd, 1, USERFAULT_TIMEOUT_SECS * 1000) == 1,
		    "The other process says nothing");
	TEST_ASSERT(read(sock, &byte, 1) == 1, "The other process died");
}

bool ring_create(struct ring *ring)
{
	struct io_uring_params *params = &ring->params;

	memset(params, 0, sizeof(*params));
	ring->fd = syscall(__NR_io_uring_setup, 1, params);
	if (ring->fd < 0)
		return false;

	TEST_ASSERT(params->features & IORING_FEAT_SINGLE_MMAP, "Rings in two mappings");
	ring->mem = __kvm_mmap(params->cq_off.cqes +
			       params->cq_entries * sizeof(struct io_uring_cqe),
			       PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
			       IORING_OFF_SQ_RING);
	ring->sqes = __kvm_mmap(sizeof(*ring->sqes), PROT_READ | PROT_WRITE, MAP_SHARED,
				ring->fd, IORING_OFF_SQES);
	return true;
}

void ring_submit(struct ring *ring, u8 opcode, int fd, void *buf, u32 len, u32 events)
{
	u32 *tail = ring->mem + ring->params.sq_off.tail;
	u32 *array = ring->mem + ring->params.sq_off.array;

	memset(ring->sqes, 0, sizeof(*ring->sqes));
	ring->sqes->opcode = opcode;
	ring->sqes->fd = fd;
	ring->sqes->addr = (u64)buf;
	ring->sqes->len = len;
	ring->sqes->poll32_events = events;

	array[0] = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	TEST_ASSERT_EQ(syscall(__NR_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0), 1);
}

static bool ring_is_done(struct ring *ring)
{
	u32 *head = ring->mem + ring->params.cq_off.head;
	u32 *tail = ring->mem + ring->params.cq_off.tail;

	return *head != __atomic_load_n(tail, __ATOMIC_ACQUIRE);
}

void ring_assert_waits(struct ring *ring)
{
	usleep(20000);
	TEST_ASSERT(!ring_is_done(ring), "A request did not wait");
}

s32 ring_result(struct ring *ring)
{
	struct io_uring_cqe *cqes = ring->mem + ring->params.cq_off.cqes;
	u32 *head = ring->mem + ring->params.cq_off.head;
	s32 res;

	userfault_wait_until(ring_is_done(ring));
	res = cqes[*head & (ring->params.cq_entries - 1)].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return res;
}

/* What is in pages that have no content yet. */
#define GARBAGE		0xee

/* Arm the page, and take its content away. */
void armed_page_init(struct armed_page *page, struct kvm_vm *vm, gpa_t gpa)
{
	u64 page_size = getpagesize();

	TEST_ASSERT(page_size <= sizeof(page->content), "The pages are too large");

	page->gpa = gpa;
	page->hva = addr_gpa2hva(vm, gpa);
	vm_userfault_arm(vm, gpa, page_size);
	memcpy(page->content, page->hva, page_size);
	memset(page->hva, GARBAGE, page_size);
}

void armed_page_assert_untouched(const struct armed_page *page)
{
	int i;

	for (i = 0; i < getpagesize(); i++)
		TEST_ASSERT(READ_ONCE(page->hva[i]) == GARBAGE,
			    "Byte %d of page %#lx was written to", i, page->gpa);
}

/* Give it its content, and let the accesses go on that wait for it. */
void armed_page_fill(const struct armed_page *page, int fd)
{
	armed_page_assert_untouched(page);
	memcpy(page->hva, page->content, getpagesize());
	userfault_resolve(fd, page->gpa, getpagesize(), 0, 0);
}

/*
 * The next access that waits, in @waiter, must be one to the page, which is filled.
 * @vcpu_id is ~0 if it is for no vCPU.
 */
void armed_page_expect_access(const struct armed_page *page, int fd,
			      struct waiter *waiter, u64 flags, u32 vcpu_id, u32 as_id)
{
	struct kvm_userfault_event event = userfault_read(fd);

	TEST_ASSERT_EQ(event.gpa, page->gpa);
	TEST_ASSERT_EQ(event.size, getpagesize());
	TEST_ASSERT_EQ(event.flags, flags);
	TEST_ASSERT_EQ(event.vcpu_id, vcpu_id);
	TEST_ASSERT_EQ(event.as_id, as_id);
	TEST_ASSERT(!event.reserved[0] && !event.reserved[1] && !event.reserved[2],
		    "Spare words are not zero");
	waiter_assert_asleep(waiter);
	armed_page_fill(page, fd);
}

#ifdef __x86_64__
/* vCPUs that never run: writing an MSR makes KVM update the wall clock. */
struct kvm_vm *kvm_access_create_vm(u32 nr_vcpus, struct kvm_vcpu *vcpus[])
{
	struct kvm_vm *vm = vm_create_barebones();
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		vcpus[i] = __vm_vcpu_add(vm, i);

	return vm;
}

int kvm_access_perform(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	int ret = _vcpu_set_msr(vcpu, MSR_KVM_WALL_CLOCK_NEW, gpa);

	TEST_ASSERT(ret == 1 || errno == EFAULT || errno == EHWPOISON,
		    KVM_IOCTL_ERROR(KVM_SET_MSRS, ret));
	return ret == 1 ? 0 : errno;
}

/* What was zero before is the version of the clock now. */
bool kvm_access_has_failed(void *hva)
{
	return !READ_ONCE(*(u32 *)hva);
}
#endif

#ifdef __aarch64__
/* Where each vCPU's last access succeeded.  That no time was stolen says nothing. */
static void *kvm_access_succeeded[AGENT_MAX_VCPUS];

/* The stolen time is updated whenever a vCPU is run. */
struct kvm_vm *kvm_access_create_vm(u32 nr_vcpus, struct kvm_vcpu *vcpus[])
{
	return agent_create_vm(VM_SHAPE_DEFAULT, nr_vcpus, vcpus);
}

int kvm_access_perform(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	struct ucall uc;
	void *hva = addr_gpa2hva(vcpu->vm, gpa);
	u64 ipa = gpa;
	int ret, error;

	WRITE_ONCE(kvm_access_succeeded[vcpu->id], NULL);

	ret = __vcpu_device_attr_set(vcpu, KVM_ARM_VCPU_PVTIME_CTRL,
				     KVM_ARM_VCPU_PVTIME_IPA, &ipa);
	TEST_ASSERT(!ret || errno == EEXIST, KVM_IOCTL_ERROR(KVM_SET_DEVICE_ATTR, ret));

	/* The guest has not run if the last such access has failed. */
	if (!agent_is_busy(vcpu))
		agent_request(vcpu, AGENT_CHECK, 0, 0);

	ret = _vcpu_run(vcpu);
	if (ret) {
		error = errno;
		TEST_ASSERT(error == EFAULT || error == EHWPOISON,
			    KVM_IOCTL_ERROR(KVM_RUN, ret));
		vcpu_assert_userfault(vcpu, gpa,
				      USERFAULT_READ | KVM_MEMORY_EXIT_FLAG_FAILED);
		return error;
	}

	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT(!agent_is_busy(vcpu), "The guest did not run");
	WRITE_ONCE(kvm_access_succeeded[vcpu->id], hva);
	return 0;
}

bool kvm_access_has_failed(void *hva)
{
	int i;

	for (i = 0; i < AGENT_MAX_VCPUS; i++) {
		if (READ_ONCE(kvm_access_succeeded[i]) == hva)
			return false;
	}

	return true;
}
#endif

static void kvm_access_fn(void *arg)
{
	struct kvm_access *access = arg;

	access->error = kvm_access_perform(access->vcpu, access->gpa);
}

void kvm_access_start(struct kvm_access *access, struct kvm_vcpu *vcpu, gpa_t gpa)
{
	access->vcpu = vcpu;
	access->gpa = gpa;
	waiter_start(&access->waiter, kvm_access_fn, access);
}
