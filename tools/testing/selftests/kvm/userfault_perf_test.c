// SPDX-License-Identifier: GPL-2.0-only
/*
 * What demand paging of guest memory costs, by KVM Userfault and by other means.
 *
 * A benchmark, which fails only if something does not work.  A run measures one
 * thing, several times over, and prints a line 'perf: THING VARIANT METRIC VALUE'
 * for each.  Costs are per operation, in cycles of the TSC on x86 and in ns on
 * arm64: where the machine counts instructions as time, as QEMU does with -icount
 * shift=0, both are instructions.
 *
 * Nothing is filled: all of guest memory is allocated, and the mapping of it that
 * KVM uses is empty whenever a round begins.
 */
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <linux/sizes.h>

#include "kernel_counts.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"
#include "userfaultfd_util.h"

#define MAX_VCPUS	66

struct bench {
	const char *name;
	const char *help;
	/* What tells one run from the other, if not the number of vCPUs. */
	u64 *variant;
	bool needs_userfault;
	int (*run)(const struct bench *bench);
	/* Once per VM, and before each round. */
	void (*init)(void);
	void (*prepare)(void);
	/* The pager, which is another process, gets a file for each of these. */
	void (*pager)(int sock);
};

static u64 nr_vcpus = 1;
static u64 nr_pages = 16384;
static int nr_rounds = 5;
static u64 nr_others = 1;
static u64 attr_gib = 1;
static bool populate;
static bool count;

static const struct bench *current_bench;
static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[MAX_VCPUS];
static u64 page_size;
static u8 *hva;
static int userfault_fd = -1;
static u8 *bitmap;

static u64 now(void)
{
#ifdef __x86_64__
	return rdtsc();
#else
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC_RAW, &ts);
	return timespec_to_ns(ts);
#endif
}

/* Which variant of the thing it is. */
static const char *variant(void)
{
	static char buf[64];

	if (current_bench->variant)
		snprintf(buf, sizeof(buf), "%lu", *current_bench->variant);
	else
		snprintf(buf, sizeof(buf), "%lu%s", nr_vcpus, populate ? "-populated" : "");
	return buf;
}

static void report(const char *metric, double value)
{
	pr_info("perf: %s %s %s %.3f\n", current_bench->name, variant(), metric, value);
}

static u64 bench_size(void)
{
	return nr_pages * page_size;
}

static u64 pages_per_vcpu(void)
{
	return nr_pages / nr_vcpus;
}

/*
 * The bitmap of the pages from AGENT_GPA on, a multiple of 128 MiB.
 */

static void bitmap_map(int fd)
{
	u64 len = align_up(DIV_ROUND_UP(nr_pages, 8), page_size);

	bitmap = __kvm_mmap(len, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			    AGENT_GPA / page_size / 8);
}

static void bitmap_clear(gpa_t gpa)
{
	u64 page = (gpa - AGENT_GPA) / page_size;

	__atomic_fetch_and(&bitmap[page / 8], (u8)~BIT(page % 8), __ATOMIC_RELEASE);
}

/*
 * Guest memory.
 */

static void add_memory(enum vm_mem_backing_src_type src)
{
	vm_userspace_mem_region_add(vm, src, AGENT_GPA, AGENT_SLOT, nr_pages, 0);
	hva = memslot2region(vm, AGENT_SLOT)->host_mem;
}

static void alloc_memory(void)
{
	memset(addr_gpa2alias(vm, AGENT_GPA), 0, bench_size());
}

static void empty_mapping(void)
{
	TEST_ASSERT(!madvise(hva, bench_size(), MADV_DONTNEED),
		    "madvise() failed, errno %d", errno);
	if (populate)
		TEST_ASSERT(!madvise(hva, bench_size(), MADV_POPULATE_WRITE),
			    "madvise() failed, errno %d", errno);
}

static void empty_and_arm(void)
{
	empty_mapping();
	vm_userfault_arm(vm, AGENT_GPA, bench_size());
}

/*
 * Another process, started when there is no VM yet.
 */

static pid_t pager_pid;
static int pager_sock;

static void send_fd(int sock, int fd)
{
	send_fds(sock, &fd, 1);
}

static int receive_fd(int sock)
{
	int fd;

	receive_fds(sock, &fd, 1);
	return fd;
}

static void pager_start(void)
{
	int socks[2];

	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, socks),
		    "socketpair() failed, errno %d", errno);
	pager_pid = fork();
	TEST_ASSERT(pager_pid >= 0, "fork() failed, errno %d", errno);
	if (!pager_pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		kvm_close(socks[0]);
		current_bench->pager(socks[1]);
		_exit(0);
	}
	kvm_close(socks[1]);
	pager_sock = socks[0];
}

static void pager_stop(void)
{
	kill(pager_pid, SIGKILL);
	waitpid(pager_pid, NULL, 0);
}

/* The pager of the queue: the bits are cleared here, the kernel merely wakes. */
static void queue_pager(int sock)
{
	struct kvm_userfault_event events[MAX_VCPUS];
	int fd = receive_fd(sock);
	ssize_t ret;
	int i;

	bitmap_map(fd);
	while ((ret = read(fd, events, sizeof(events))) > 0) {
		for (i = 0; i < ret / sizeof(*events); i++) {
			bitmap_clear(events[i].gpa);
			__userfault_resolve(fd, events[i].gpa, page_size,
					    KVM_USERFAULT_WAKE_ONLY, 0);
		}
	}
}

/* Handlers of userfaultfd that sleep in read(), one for each file. */
static void *uffd_read_thread(void *arg)
{
	int uffd = (long)arg;
	struct uffd_msg msg;

	while (read(uffd, &msg, sizeof(msg)) == sizeof(msg))
		__uffd_continue(uffd, (void *)msg.arg.pagefault.address, page_size, 0);

	return NULL;
}

static void uffd_read_start(int uffd)
{
	pthread_t thread;

	kvm_pthread_create(&thread, NULL, uffd_read_thread, (void *)(long)uffd);
}

static void uffd_pager(int sock)
{
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		uffd_read_start(receive_fd(sock));
	pause();
}

/*
 * vCPUs, each of which has a thread and a part of the memory, and writes to each
 * page of it once per round.
 */

struct guest_args {
	u64 gva;
	u64 nr_pages;
	u64 page_size;
};

static struct guest_args guest_args[MAX_VCPUS];

static void guest_code(u32 id)
{
	struct guest_args *args = &guest_args[id];
	u64 i;

	for (;;) {
		GUEST_SYNC(0);
		for (i = 0; i < args->nr_pages; i++)
			WRITE_ONCE(*(u64 *)(args->gva + i * args->page_size), i);
	}
}

struct worker {
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	u64 nr_runs;
};

static struct worker workers[MAX_VCPUS];
static pthread_barrier_t round_start;
static sem_t round_done;
static u32 nr_working;
static u64 round_end;

static void run_to_sync(struct worker *worker)
{
	struct kvm_vcpu *vcpu = worker->vcpu;
	int ret;

	for (;;) {
		worker->nr_runs++;
		ret = __vcpu_run(vcpu);
		if (!ret)
			break;
		if (vcpu_has_userfault(vcpu, ret))
			bitmap_clear(vcpu->run->memory_fault.gpa);
		else if (errno != EINTR)
			vcpu_fail_run(vcpu, ret, "the guest's report");
	}

	if (get_ucall(vcpu, NULL) != UCALL_SYNC)
		vcpu_fail_run(vcpu, ret, "the guest's report");
}

static void *vcpu_thread(void *arg)
{
	struct worker *worker = arg;

	/* Up to where a round starts. */
	run_to_sync(worker);

	for (;;) {
		pthread_barrier_wait(&round_start);
		run_to_sync(worker);
		if (!__atomic_sub_fetch(&nr_working, 1, __ATOMIC_ACQ_REL)) {
			round_end = now();
			sem_post(&round_done);
		}
	}

	return NULL;
}

static void create_vm(void)
{
	u32 i;

	vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, nr_vcpus, 0, guest_code, vcpus);
	add_memory(VM_MEM_SRC_SHMEM);
	virt_map(vm, AGENT_GPA, AGENT_GPA, nr_pages);
	alloc_memory();

	for (i = 0; i < nr_vcpus; i++) {
		vcpu_args_set(vcpus[i], 1, i);
		guest_args[i] = (struct guest_args) {
			.gva = AGENT_GPA + i * pages_per_vcpu() * page_size,
			.nr_pages = pages_per_vcpu(),
			.page_size = page_size,
		};
	}
	sync_global_to_guest(vm, guest_args);
}

static void start_workers(void)
{
	u32 i;

	pthread_barrier_init(&round_start, NULL, nr_vcpus + 1);
	sem_init(&round_done, 0, 0);
	for (i = 0; i < nr_vcpus; i++) {
		workers[i].vcpu = vcpus[i];
		kvm_pthread_create(&workers[i].thread, NULL, vcpu_thread, &workers[i]);
	}
}

static u64 total_runs(void)
{
	u64 sum = 0;
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		sum += workers[i].nr_runs;

	return sum;
}

static u64 total_exits(void)
{
	u64 sum = 0;
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		sum += vcpu_get_stat(vcpus[i], exits);

	return sum;
}

/* From the time that the vCPUs are let go to that when the last has finished. */
static u64 vcpu_round(void)
{
	u64 start;

	nr_working = nr_vcpus;
	start = now();
	pthread_barrier_wait(&round_start);
	while (sem_wait(&round_done))
		;

	return round_end - start;
}

static void report_count(const char *name, u64 nr)
{
	/* Ten in a thousand are noise of rounds starting and ending. */
	if (nr * 100 >= nr_pages)
		report(name, (double)nr / nr_pages);
	else if (strncmp(name, "lock:", 5))
		report(name, (double)nr / nr_pages);
}

static void counted_round(u64 (*measure)(void))
{
	struct rusage before, after;
	u64 runs, exits;

	kernel_counts_init();
	current_bench->prepare();

	runs = total_runs();
	exits = total_exits();
	getrusage(RUSAGE_SELF, &before);
	kernel_counts_start();
	measure();
	kernel_counts_stop();
	getrusage(RUSAGE_SELF, &after);

	kernel_counts_for_each(report_count);
	report("kvm_run_calls", (double)(total_runs() - runs) / nr_pages);
	report("exits", (double)(total_exits() - exits) / nr_pages);
	/* The others are for time slices that end, which depends on the machine. */
	report("own_switches", (double)(after.ru_nvcsw - before.ru_nvcsw) / nr_pages);
}

/* The first round is for whatever happens only once. */
static void measure_rounds(u64 (*measure)(void))
{
	u64 cost;
	int i;

	for (i = -1; i < nr_rounds; i++) {
		current_bench->prepare();
		cost = measure();
		if (i >= 0)
			report("cost", (double)cost / nr_pages);
	}

	if (count)
		counted_round(measure);
}

static int run_vcpu_faults(const struct bench *bench)
{
	nr_pages -= nr_pages % nr_vcpus;

	if (bench->pager)
		pager_start();
	create_vm();
	bench->init();
	start_workers();
	measure_rounds(vcpu_round);
	if (bench->pager)
		pager_stop();

	return 0;
}

static void plain_init(void)
{
}

static void exit_init(void)
{
	vm_userfault_enable(vm);
	userfault_fd = vm_create_userfault_fd(vm);
	bitmap_map(userfault_fd);
}

static void queue_init(void)
{
	vm_userfault_enable_async(vm, KVM_USERFAULT_ASYNC_VCPU);
	userfault_fd = vm_create_userfault_fd(vm);
	send_fd(pager_sock, userfault_fd);
}

static int uffd_create(u32 vcpu, bool blocking)
{
	u64 size = pages_per_vcpu() * page_size;
	int uffd = uffd_open(0);

	uffd_register(uffd, hva + vcpu * size, size, UFFDIO_REGISTER_MODE_MINOR);
	if (blocking)
		TEST_ASSERT(!fcntl(uffd, F_SETFL, 0), "fcntl() failed, errno %d", errno);

	return uffd;
}

static int uffd_handler(int mode, int uffd, struct uffd_msg *msg)
{
	return __uffd_continue(uffd, (void *)msg->arg.pagefault.address, page_size, 0);
}

/* As demand_paging_test does it: epoll_wait(), read(), and UFFDIO_CONTINUE. */
static void uffd_init(void)
{
	u64 size = pages_per_vcpu() * page_size;
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MINOR, 0, hva + i * size,
					 size, 1, uffd_handler);
}

static void uffd_read_init(void)
{
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		uffd_read_start(uffd_create(i, true));
}

static void uffd_process_init(void)
{
	u32 i;

	for (i = 0; i < nr_vcpus; i++)
		send_fd(pager_sock, uffd_create(i, true));
}

/*
 * Accesses by KVM itself, by as many vCPUs as there are pages.
 */

static u64 access_round(void)
{
	u64 start = now();
	u64 i;

	for (i = 0; i < nr_pages; i++)
		kvm_access_perform(vcpus[i], page_gpa(i));

	return now() - start;
}

static int run_accesses(const struct bench *bench)
{
	if (nr_vcpus > AGENT_MAX_VCPUS)
		nr_vcpus = AGENT_MAX_VCPUS;
	nr_pages = nr_vcpus;

	if (bench->pager)
		pager_start();
	vm = kvm_access_create_vm(nr_vcpus, vcpus);
	add_memory(VM_MEM_SRC_SHMEM);
	alloc_memory();
	bench->init();
	measure_rounds(access_round);
	if (bench->pager)
		pager_stop();

	return 0;
}

static void access_queue_init(void)
{
	vm_userfault_enable_async(vm, 0);
	userfault_fd = vm_create_userfault_fd(vm);
	send_fd(pager_sock, userfault_fd);
}

static void access_uffd_init(void)
{
	int uffd = uffd_open(0);

	uffd_register(uffd, hva, bench_size(), UFFDIO_REGISTER_MODE_MINOR);
	TEST_ASSERT(!fcntl(uffd, F_SETFL, 0), "fcntl() failed, errno %d", errno);
	send_fd(pager_sock, uffd);
}

static void access_uffd_pager(int sock)
{
	uffd_read_thread((void *)(long)receive_fd(sock));
}

/*
 * Waking one vCPU while others wait: vCPU 0 faults on all of its pages, the others
 * stay where they are.  Whoever wakes runs before those that are woken.
 */

static void set_realtime(void)
{
	struct sched_param param = { .sched_priority = 1 };

	TEST_ASSERT(!sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &param),
		    "sched_setscheduler() failed, errno %d", errno);
}

static u64 wake_queue(void)
{
	struct kvm_userfault_event event;
	u64 start;

	TEST_ASSERT_EQ(read(userfault_fd, &event, sizeof(event)), sizeof(event));
	if (event.vcpu_id)
		return 0;

	bitmap_clear(event.gpa);
	start = now();
	userfault_resolve(userfault_fd, event.gpa, page_size, KVM_USERFAULT_WAKE_ONLY, 0);
	return now() - start;
}

static int wake_uffd_fd;

static u64 wake_uffd(void)
{
	struct uffd_msg msg;
	void *addr;
	u64 start;

	TEST_ASSERT_EQ(read(wake_uffd_fd, &msg, sizeof(msg)), sizeof(msg));
	addr = (void *)msg.arg.pagefault.address;
	if (addr >= (void *)hva + pages_per_vcpu() * page_size)
		return 0;

	__uffd_continue(wake_uffd_fd, addr, page_size, UFFDIO_CONTINUE_MODE_DONTWAKE);
	start = now();
	__uffd_wake(wake_uffd_fd, addr, page_size);
	return now() - start;
}

/* Each page is an operation: report what one costs on average, for each round. */
static void wake_rounds(u64 (*wake)(void))
{
	u64 nr = pages_per_vcpu(), cost, sum;
	int i;
	u64 j;

	for (i = -1; i < nr_rounds; i++) {
		sum = 0;
		for (j = 0; j < nr / (nr_rounds + 1); j++) {
			while (!(cost = wake()))
				;
			sum += cost;
		}
		if (i >= 0)
			report("cost", (double)sum / j);
	}
}

static int run_wakes(const struct bench *bench)
{
	nr_vcpus = nr_others + 1;
	nr_pages = 600 * nr_vcpus;

	create_vm();
	bench->init();
	bench->prepare();
	start_workers();
	nr_working = nr_vcpus;
	pthread_barrier_wait(&round_start);
	usleep(100000);
	set_realtime();
	wake_rounds(userfault_fd >= 0 ? wake_queue : wake_uffd);

	return 0;
}

static void wake_queue_init(void)
{
	vm_userfault_enable_async(vm, KVM_USERFAULT_ASYNC_VCPU);
	userfault_fd = vm_create_userfault_fd(vm);
	bitmap_map(userfault_fd);
}

static void wake_uffd_init(void)
{
	wake_uffd_fd = uffd_open(0);
	uffd_register(wake_uffd_fd, hva, bench_size(), UFFDIO_REGISTER_MODE_MINOR);
	TEST_ASSERT(!fcntl(wake_uffd_fd, F_SETFL, 0), "fcntl() failed, errno %d", errno);
}

/*
 * Attributes of a memslot that is empty.
 */

#define ONE_BY_ONE	8192

static s64 slab_bytes(void)
{
	char line[128];
	s64 kib = 0;
	FILE *file;

	/* What the last VM had is freed with delay. */
	sleep(1);

	file = fopen("/proc/meminfo", "r");
	TEST_ASSERT(file, "Cannot open /proc/meminfo");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "Slab: %ld kB", &kib) == 1)
			break;
	}
	fclose(file);

	return kib * SZ_1K;
}

static void create_attr_vm(void)
{
	u64 size = attr_gib * SZ_1G;
	void *mem;

#ifdef __x86_64__
	if (kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM))
		vm = vm_create_barebones_type(KVM_X86_SW_PROTECTED_VM);
	else
#endif
		vm = vm_create_barebones();

	mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap() failed, errno %d", errno);
	vm_set_user_memory_region(vm, AGENT_SLOT, 0, AGENT_GPA, size, mem);
}

static u64 attr_set_cost(u64 attr, bool set)
{
	u64 flags = set ? KVM_MEMORY_ATTRIBUTES_SET : KVM_MEMORY_ATTRIBUTES_CLEAR;
	u64 start = now();

	vm_change_attributes(vm, AGENT_GPA, attr_gib * SZ_1G, attr, flags);
	return now() - start;
}

/* As it is done with no flags: the given attributes replace the old ones. */
static u64 attr_one_by_one(u64 attr, u64 flags)
{
	u64 start = now();
	u64 i;

	for (i = 0; i < ONE_BY_ONE; i++)
		vm_change_attributes(vm, page_gpa(i), page_size, attr, flags);

	return now() - start;
}

static int run_attr(u64 attr, u64 clear_flags)
{
	u64 clear_attr = clear_flags ? attr : 0;
	u64 pages = attr_gib * SZ_1G / page_size;
	double cost;
	s64 slab;
	int i;

	for (i = -1; i < nr_rounds; i++) {
		create_attr_vm();
		if (attr == KVM_MEMORY_ATTRIBUTE_USERFAULT)
			vm_userfault_enable(vm);

		slab = slab_bytes();
		cost = attr_set_cost(attr, true);
		slab = slab_bytes() - slab;
		if (i >= 0) {
			report("cost", cost);
			report("cost_per_page", cost / pages);
			report("slab_bytes_per_page", (double)slab / pages);
			report("slab_bytes", slab);
			if (attr == KVM_MEMORY_ATTRIBUTE_USERFAULT)
				report("bitmap_bytes",
				       vm_get_stat(vm, userfault_bitmap_pages) * page_size);
		}

		cost = attr_one_by_one(clear_attr, clear_flags);
		if (i >= 0)
			report("clear_one", cost / ONE_BY_ONE);
		kvm_vm_free(vm);
	}

	return 0;
}

static int run_arm(const struct bench *bench)
{
	return run_attr(KVM_MEMORY_ATTRIBUTE_USERFAULT, KVM_MEMORY_ATTRIBUTES_CLEAR);
}

static int run_private(const struct bench *bench)
{
#ifdef __x86_64__
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));
#else
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE);
#endif

	return run_attr(KVM_MEMORY_ATTRIBUTE_PRIVATE, 0);
}

/*
 * Huge mappings: of a VM that never used userfaults, of the blocks of a VM in
 * which no page is armed while one of every other block is, and after all.
 */

#ifdef __x86_64__
static void touch_all(void)
{
	run_to_sync(&workers[0]);
}

static int run_huge(const struct bench *bench)
{
	const u64 nr_blocks = 32;
	u64 i;

	TEST_REQUIRE(has_hugetlb(SZ_2M, nr_blocks));

	nr_vcpus = 1;
	nr_pages = nr_blocks * SZ_2M / page_size;
	vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, 1, 0, guest_code, vcpus);
	add_memory(VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB);
	virt_map(vm, AGENT_GPA, AGENT_GPA, nr_pages);
	memset(hva, 0, bench_size());
	vcpu_args_set(vcpus[0], 1, 0);
	/* A page of each block, and not the last. */
	guest_args[0] = (struct guest_args) { AGENT_GPA, nr_blocks, SZ_2M };
	sync_global_to_guest(vm, guest_args);

	workers[0].vcpu = vcpus[0];
	touch_all();
	touch_all();
	report("pages_2m_never", vm_get_stat(vm, pages_2m));

	/* Only the last page of every other block stays armed. */
	exit_init();
	vm_userfault_arm(vm, AGENT_GPA, bench_size());
	for (i = 0; i < nr_pages; i++) {
		if ((i + 1) % (2 * SZ_2M / page_size))
			bitmap_clear(page_gpa(i));
	}
	touch_all();
	report("pages_2m_clean_blocks", vm_get_stat(vm, pages_2m));
	report("clean_blocks", nr_blocks / 2);

	vm_userfault_disable(vm);
	touch_all();
	report("pages_2m_disabled", vm_get_stat(vm, pages_2m));

	return 0;
}
#endif

static const struct bench benches[] = {
	{
		.name = "plain",
		.help = "vCPU faults, nothing intercepts them",
		.run = run_vcpu_faults,
		.init = plain_init,
		.prepare = empty_mapping,
	}, {
		.name = "exit",
		.help = "vCPU faults, userfault exits, pages cleared through the mapped bitmap",
		.needs_userfault = true,
		.run = run_vcpu_faults,
		.init = exit_init,
		.prepare = empty_and_arm,
	}, {
		.name = "queue",
		.help = "vCPU faults, through the queue to a pager in another process",
		.needs_userfault = true,
		.run = run_vcpu_faults,
		.init = queue_init,
		.prepare = empty_and_arm,
		.pager = queue_pager,
	}, {
		.name = "uffd",
		.help = "vCPU faults, a userfaultfd and a thread that epolls per vCPU",
		.run = run_vcpu_faults,
		.init = uffd_init,
		.prepare = empty_mapping,
	}, {
		.name = "uffd-read",
		.help = "vCPU faults, a userfaultfd and a thread that reads per vCPU",
		.run = run_vcpu_faults,
		.init = uffd_read_init,
		.prepare = empty_mapping,
	}, {
		.name = "uffd-process",
		.help = "the same, with the threads in another process",
		.run = run_vcpu_faults,
		.init = uffd_process_init,
		.prepare = empty_mapping,
		.pager = uffd_pager,
	}, {
		.name = "access-plain",
		.help = "accesses by KVM, nothing intercepts them",
		.run = run_accesses,
		.init = plain_init,
		.prepare = empty_mapping,
	}, {
		.name = "access-queue",
		.help = "accesses by KVM, through the queue to a pager in another process",
		.needs_userfault = true,
		.run = run_accesses,
		.init = access_queue_init,
		.prepare = empty_and_arm,
		.pager = queue_pager,
	}, {
		.name = "access-uffd",
		.help = "accesses by KVM, through userfaultfd to a pager in another process",
		.run = run_accesses,
		.init = access_uffd_init,
		.prepare = empty_mapping,
		.pager = access_uffd_pager,
	}, {
		.name = "wake-queue",
		.variant = &nr_others,
		.help = "waking a vCPU while -o others wait, by the userfault file",
		.needs_userfault = true,
		.run = run_wakes,
		.init = wake_queue_init,
		.prepare = empty_and_arm,
	}, {
		.name = "wake-uffd",
		.variant = &nr_others,
		.help = "waking a vCPU while -o others wait, by userfaultfd",
		.run = run_wakes,
		.init = wake_uffd_init,
		.prepare = empty_mapping,
	}, {
		.name = "arm",
		.variant = &attr_gib,
		.help = "arming -g GiB at once, clearing single pages",
		.needs_userfault = true,
		.run = run_arm,
	}, {
		.name = "private",
		.variant = &attr_gib,
		.help = "the same with KVM_MEMORY_ATTRIBUTE_PRIVATE",
		.run = run_private,
	},
#ifdef __x86_64__
	{
		.name = "huge",
		.help = "huge mappings while, and after, pages are armed",
		.needs_userfault = true,
		.run = run_huge,
	},
#endif
};

static void help(const char *name)
{
	int i;

	printf("usage: %s [-h] [-v vcpus] [-n pages] [-r rounds] [-o others]\n"
	       "          [-g GiB] [-p] [-c] THING\n", name);
	printf(" -p: populate the mapping that KVM uses beforehand\n"
	       " -c: one more round, in which events in the kernel are counted\n"
	       "THING is one of:\n");
	for (i = 0; i < ARRAY_SIZE(benches); i++)
		printf(" %-14s %s\n", benches[i].name, benches[i].help);
	exit(0);
}

static const struct bench *find_bench(const char *name)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(benches); i++) {
		if (!strcmp(benches[i].name, name))
			return &benches[i];
	}

	TEST_FAIL("There is no '%s', try -h", name);
	return NULL;
}

int main(int argc, char *argv[])
{
	const char *thing = "exit";
	int opt;

	page_size = getpagesize();

	while ((opt = getopt(argc, argv, "hv:n:r:o:g:pc")) != -1) {
		switch (opt) {
		case 'v':
			nr_vcpus = atoi_positive("Number of vCPUs", optarg);
			break;
		case 'n':
			nr_pages = atoi_positive("Number of pages", optarg);
			break;
		case 'r':
			nr_rounds = atoi_positive("Number of rounds", optarg);
			break;
		case 'o':
			nr_others = atoi_positive("Number of others", optarg);
			break;
		case 'g':
			attr_gib = atoi_positive("GiB", optarg);
			break;
		case 'p':
			populate = true;
			break;
		case 'c':
			count = true;
			break;
		default:
			help(argv[0]);
		}
	}

	if (optind < argc)
		thing = argv[optind];
	TEST_ASSERT(nr_vcpus < MAX_VCPUS && nr_others < MAX_VCPUS - 1, "Too many vCPUs");

	/* For a log that is read while this runs. */
	setbuf(stdout, NULL);
	current_bench = find_bench(thing);
	/* Before there is a pager that would miss its file. */
	TEST_REQUIRE(!current_bench->needs_userfault ||
		     kvm_check_cap(KVM_CAP_USERFAULT) & KVM_USERFAULT_ASYNC);

	return current_bench->run(current_bench);
}
