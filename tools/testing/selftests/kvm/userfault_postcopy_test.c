// SPDX-License-Identifier: GPL-2.0-only
/*
 * Post-copy live migration of a running guest.
 *
 * There are two VMMs, processes that have nothing in common but a connection.  At
 * the source, vCPUs write a pattern all over the memory while that is copied, with
 * dirty logging, a few times.  Then the vCPUs stop, their state moves, and they go on
 * at the destination, where all pages that were not copied, or written since, are
 * armed.  A process that the source forks serves these pages: those that are needed
 * at once, and all others when there is time.
 *
 * Everything is checked twice.  The guest knows what each page has to contain, and
 * would notice as well if the VMM had run it on a page as it was in an earlier round.
 * And the hash of each page when it was placed has to be that of the page at the
 * source when the guest was stopped there.  With userfaultfd the guest may write to a
 * page before that can be hashed: it is the hash of what was to be placed.  So the pages
 * that the guest has not changed are hashed once more, in memory, after the last of them
 * was placed.  For those that it has changed by then there is only its own check.
 */
#include <ctype.h>
#include <fcntl.h>
#include <linux/bitmap.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "kselftest.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_postcopy.h"
#include "userfaultfd_util.h"

#define MAX_VCPUS	64

/* For failures this much memory is enough. */
#define FAILURE_SIZE	SZ_2M

static struct postcopy_options opts = {
	.mode = POSTCOPY_USERFAULT,
	.src = VM_MEM_SRC_ANONYMOUS,
	.nr_vcpus = 2,
	.rounds = 2,
	.size = SZ_16M,
};

static const char * const mode_names[] = {
	[POSTCOPY_USERFAULT]	= "userfault",
	[POSTCOPY_ASYNC]	= "async",
	[POSTCOPY_UFFD]		= "uffd",
	[POSTCOPY_UFFD_VCPU]	= "uffd-vcpu",
	[POSTCOPY_BOTH]		= "both",
};

static const char * const failure_names[] = {
	[POSTCOPY_NO_FAILURE]		= "migration",
	[POSTCOPY_SERVER_KILLED]	= "server_killed",
	[POSTCOPY_CONNECTION_CUT]	= "connection_cut",
	[POSTCOPY_DUPLICATE_PAGES]	= "duplicate_pages",
	[POSTCOPY_WRONG_PAGES]		= "wrong_pages",
	[POSTCOPY_ONLY_WRONG_PAGES]	= "only_wrong_pages",
	[POSTCOPY_SOURCE_KILLED]	= "source_killed",
	[POSTCOPY_DESTINATION_KILLED]	= "destination_killed",
};

/* What the VMMs report to the test. */
struct report {
	u64 nr_pages;
	u64 precopied;
	u64 stale;
	/* When vCPUs were to stop, ran again, had their first beat, had all pages. */
	u64 stop_ns;
	u64 run_ns;
	u64 beat_ns;
	u64 placed_ns;
	u64 latency_p50_ns;
	u64 latency_p99_ns;
	u64 latency_max_ns;
	u64 kvm_exits;
	u64 kvm_records;
	u64 huge_blocks;
	u64 huge_mappings;
	bool huge_unknown;
	u64 lost;
	u64 nr_progress;
	u64 hash;
	struct postcopy_stats stats;
};

static struct report *report;

/*
 * The guest.  Some of its pages are zero, some are written once, and all others again
 * and again, each time with other content.  The last ones are used by KVM as well.
 */

static u64 page_size;

enum page_kind {
	PAGE_ZERO,
	PAGE_COLD,
	PAGE_HOT,
};

static enum page_kind page_kind(u64 page)
{
	u32 hash = (u32)page * 0x9e3779b1u >> 29;

	return hash < 2 ? PAGE_ZERO : hash < 5 ? PAGE_COLD : PAGE_HOT;
}

/* What is in the page, when @pass has not got there yet. */
static u64 page_generation(u64 page, u64 pass)
{
	return page_kind(page) == PAGE_HOT ? pass : 1;
}

/* The first word of a page.  KVM reads the lower half of it, at times. */
static u64 page_header(u64 page, u64 generation)
{
	return generation << 32 | (generation & 0xfff) << 20 | page;
}

/* Of a vCPU.  No vCPU writes to pages of another. */
struct slice {
	u64 first;
	u64 nr;
	u64 kvm_page;
};

static struct slice vcpu_slice(u64 id, u64 nr_vcpus, u64 nr_pages)
{
	u64 nr = (nr_pages - nr_vcpus) / nr_vcpus;

	return (struct slice) {
		.first = id * nr,
		.nr = nr,
		.kvm_page = nr_pages - nr_vcpus + id,
	};
}

/* A prime that takes the guest through its pages in an order that nobody guesses. */
#define STRIDE	7919

enum guest_word {
	GUEST_BEAT = 1,		/* And how often the heart has beaten. */
	GUEST_PASS,		/* And how many passes are done. */
	GUEST_BAD_PAGE,		/* And its number. */
	GUEST_BAD_IRQCHIP,
};

#define PAGES_PER_BEAT	32

static void guest_say(enum guest_word what, u64 arg)
{
	ucall_arch_do_ucall((u64)what << 56 | arg);
}

static void guest_fail(enum guest_word what, u64 arg)
{
	for (;;)
		guest_say(what, arg);
}

static u64 *guest_page(u64 page)
{
	return (u64 *)(AGENT_GPA + page * page_size);
}

static u64 guest_next(u64 word)
{
	return word * 6364136223846793005ull + 1442695040888963407ull;
}

/* From the word @first on, that has the header, then the sum of all that follow. */
static void guest_write_page(u64 page, u64 first, u64 generation)
{
	u64 word = page_header(page, generation);
	u64 *words = guest_page(page);
	u64 sum = 0;
	u64 i;

	WRITE_ONCE(words[first], word);
	for (i = first + 2; i < page_size / sizeof(*words); i++) {
		word = guest_next(word);
		sum += word;
		WRITE_ONCE(words[i], word);
	}
	WRITE_ONCE(words[first + 1], sum);
}

static void guest_check_page(u64 page, u64 first, u64 generation)
{
	u64 word = page_header(page, generation);
	u64 *words = guest_page(page);
	u64 bad = 0, sum = 0;
	u64 i;

	bad = READ_ONCE(words[first]) ^ word;
	for (i = first + 2; i < page_size / sizeof(*words); i++) {
		word = guest_next(word);
		sum += READ_ONCE(words[i]);
		bad |= READ_ONCE(words[i]) ^ word;
	}
	if (bad || READ_ONCE(words[first + 1]) != sum)
		guest_fail(GUEST_BAD_PAGE, page);
}

/* Half of these pages are written, for some to be dirty that are zero. */
static void guest_visit_zero(u64 page)
{
	u64 *words = guest_page(page);
	u64 bad = 0;
	u64 i;

	for (i = 0; i < page_size / sizeof(*words); i++)
		bad |= READ_ONCE(words[i]);
	if (bad)
		guest_fail(GUEST_BAD_PAGE, page);
	if (page % 2)
		WRITE_ONCE(words[0], 0);
}

static void guest_visit(u64 page, u64 pass, bool emulate)
{
	enum page_kind kind = page_kind(page);

	if (kind == PAGE_ZERO)
		return guest_visit_zero(page);

	if (emulate)
		arch_guest_emulate((u32 *)guest_page(page));
	guest_check_page(page, 0, page_generation(page, pass));
	if (kind == PAGE_HOT)
		guest_write_page(page, 0, pass + 1);
}

#define KVM_PAGE_FIRST	(POSTCOPY_KVM_BYTES / sizeof(u64))

static void guest_pass(u64 id, struct slice *slice, u64 pass, u64 *beat)
{
	u64 i;

	for (i = 0; i < slice->nr; i++) {
		guest_visit(slice->first + i * STRIDE % slice->nr, pass, !(i % 16));
		if (!(i % PAGES_PER_BEAT))
			guest_say(GUEST_BEAT, ++*beat);
	}

	guest_check_page(slice->kvm_page, KVM_PAGE_FIRST, pass);
	guest_write_page(slice->kvm_page, KVM_PAGE_FIRST, pass + 1);
	if (!arch_guest_check_irqchip(id))
		guest_fail(GUEST_BAD_IRQCHIP, id);
}

static void guest_code(u64 id, u64 nr_vcpus, u64 nr_pages)
{
	struct slice slice = vcpu_slice(id, nr_vcpus, nr_pages);
	u64 beat = 0, pass = 1;
	u64 i;

	arch_guest_setup_irqchip(id);
	for (i = 0; i < slice.nr; i++) {
		if (page_kind(slice.first + i) != PAGE_ZERO)
			guest_write_page(slice.first + i, 0, 1);
	}
	guest_write_page(slice.kvm_page, KVM_PAGE_FIRST, 1);

	for (;; pass++) {
		guest_pass(id, &slice, pass, &beat);
		guest_say(GUEST_PASS, pass);
	}
}

/*
 * A VM, the same at both ends.
 */

static struct kvm_vcpu *vcpus[MAX_VCPUS];
static struct postcopy_memory mem;

/* is_backing_src_hugetlb() knows only those that mmap() is told of. */
static bool is_hugetlb(enum vm_mem_backing_src_type src)
{
	return src == VM_MEM_SRC_SHARED_HUGETLB || is_backing_src_hugetlb(src);
}

/* For a pager in another process.  The library creates it as anonymous memory. */
static int share_slot0(struct kvm_vm *vm)
{
	struct userspace_mem_region *region = memslot2region(vm, 0);
	u64 size = region->region.memory_size;
	int fd = kvm_memfd_alloc(size, false);

	TEST_ASSERT_EQ(pwrite(fd, region->host_mem, size, 0), size);
	TEST_ASSERT(mmap(region->host_mem, size, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_FIXED, fd, 0) == region->host_mem,
		    "mmap() failed, errno %d", errno);

	return fd;
}

static void init_region(struct postcopy_region *region, struct kvm_vm *vm, u32 slot, int fd)
{
	struct userspace_mem_region *mem_region = memslot2region(vm, slot);

	region->slot = slot;
	region->gpa = mem_region->region.guest_phys_addr;
	region->size = mem_region->region.memory_size;
	region->hva = mem_region->host_mem;
	region->vmm_hva = mem_region->host_mem;
	region->fd = fd;

	/* Userfaultfd can't do a part of a huge page. */
	region->unit = page_size;
	if (postcopy_uses_uffd(&opts) && is_hugetlb(mem_region->backing_src_type))
		region->unit = get_backing_src_pagesz(mem_region->backing_src_type);

	region->first = mem.nr_pages;
	region->nr = region->size / region->unit;
	mem.nr_pages += region->nr;
	mem.max_unit = max(mem.max_unit, region->unit);
}

static struct kvm_vm *create_vm(void)
{
	struct kvm_vm *vm;
	int fd = -1;
	u32 i;

	vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, opts.nr_vcpus, opts.size / page_size,
				    guest_code, vcpus);
	vm_userspace_mem_region_add(vm, opts.src, AGENT_GPA, AGENT_SLOT,
				    opts.size / vm->page_size, 0);
	agent_map(vm, AGENT_GPA, AGENT_GPA, opts.size);
	sync_global_to_guest(vm, page_size);
	for (i = 0; i < opts.nr_vcpus; i++)
		vcpu_args_set(vcpus[i], 3, (u64)i, (u64)opts.nr_vcpus, opts.size / page_size);

	if (opts.external_pager)
		fd = share_slot0(vm);
	init_region(&mem.regions[0], vm, 0, fd);
	init_region(&mem.regions[1], vm, AGENT_SLOT, memslot2region(vm, AGENT_SLOT)->fd);

	return vm;
}

static bool can_log_dirty_pages(struct postcopy_region *region)
{
	return region->slot != AGENT_SLOT || opts.src != VM_MEM_SRC_GUEST_MEMFD;
}

static u64 bitmap_bytes(void)
{
	return BITS_TO_LONGS(mem.nr_pages) * sizeof(long);
}

/*
 * Threads that run vCPUs.
 */

struct runner {
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	pid_t tid;
	/* As reported by the guest. */
	u64 beat;
	u64 pass;
	bool pause;
	bool done;
	/* How often in a row it stopped at a page that is there. */
	u32 nr_futile;
	/* It needs a page that does not come. */
	bool lost;
};

static struct runner runners[MAX_VCPUS];

/* At the destination only. */
static struct postcopy_shared *shared;
static struct postcopy_pager pager;
static int asked_fd = -1;

/* The page may have been placed since, but then the next attempt must do. */
#define MAX_FUTILE	16

static bool handle_userfault(struct runner *runner)
{
	u64 page = postcopy_gpa_page(&mem, runner->vcpu->run->memory_fault.gpa);
	u32 state = postcopy_mark_asked(shared, page, POSTCOPY_ASKED_BY_EXIT);
	u64 asked[] = { page, state };

	runner->nr_futile = state & POSTCOPY_PLACED ? runner->nr_futile + 1 : 0;
	TEST_ASSERT(runner->nr_futile < MAX_FUTILE,
		    "vCPU %u does not get page %lu, which is there", runner->vcpu->id, page);

	if (asked_fd < 0)
		postcopy_ask(&pager, page, state, POSTCOPY_ASKED_BY_EXIT);
	else
		TEST_ASSERT_EQ(write(asked_fd, asked, sizeof(asked)), sizeof(asked));

	return postcopy_wait_for_page(shared, page);
}

/* What KVM has read must not be stale, either. */
static void check_emulated(struct runner *runner, u32 word)
{
	struct slice slice = vcpu_slice(runner->vcpu->id, opts.nr_vcpus,
					opts.size / page_size);
	u64 page = word & (BIT(20) - 1);
	u64 generation = page_generation(page, runner->pass + 1);

	TEST_ASSERT(page >= slice.first && page < slice.first + slice.nr &&
		    word == (u32)page_header(page, generation),
		    "vCPU %u: KVM has read %#x, in pass %lu", runner->vcpu->id, word,
		    runner->pass + 1);
}

static void listen_to_guest(struct runner *runner, u64 word)
{
	u64 arg = word & (BIT_ULL(56) - 1);

	switch (word >> 56) {
	case GUEST_BEAT:
		TEST_ASSERT(arg == runner->beat + 1, "vCPU %u: beat %lu follows %lu",
			    runner->vcpu->id, arg, runner->beat);
		WRITE_ONCE(runner->beat, arg);
		break;
	case GUEST_PASS:
		TEST_ASSERT(arg == runner->pass + 1, "vCPU %u: pass %lu follows %lu",
			    runner->vcpu->id, arg, runner->pass);
		WRITE_ONCE(runner->pass, arg);
		break;
	case GUEST_BAD_PAGE:
		TEST_FAIL("vCPU %u: page %lu is not as it should be, in pass %lu",
			  runner->vcpu->id, arg, runner->pass + 1);
	case GUEST_BAD_IRQCHIP:
		TEST_FAIL("vCPU %u: the interrupt controller has changed",
			  runner->vcpu->id);
	default:
		TEST_FAIL("vCPU %u: unexpected exit %s, %#lx, after beat %lu in pass %lu",
			  runner->vcpu->id,
			  exit_reason_str(runner->vcpu->run->exit_reason), word,
			  runner->beat, runner->pass + 1);
	}
}

/* Returns false if there is no point in running the vCPU again. */
static bool run_once(struct runner *runner)
{
	struct kvm_vcpu *vcpu = runner->vcpu;
	u32 word;
	int ret;

	do {
		ret = __vcpu_run(vcpu);
	} while (ret == -1 && errno == EINTR);

	if (vcpu_has_userfault(vcpu, ret)) {
		runner->lost = !handle_userfault(runner);
		return !runner->lost;
	}
	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_RUN, ret));

	if (arch_get_emulated(vcpu, &word))
		check_emulated(runner, word);
	else
		listen_to_guest(runner, (u64)ucall_arch_get_ucall(vcpu));
	if (shared && !READ_ONCE(report->beat_ns))
		WRITE_ONCE(report->beat_ns, postcopy_now_ns());

	return !READ_ONCE(runner->pause);
}

static void *runner_fn(void *arg)
{
	struct runner *runner = arg;

	WRITE_ONCE(runner->tid, syscall(__NR_gettid));
	while (run_once(runner))
		;
	__atomic_store_n(&runner->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void start_runners(void)
{
	u32 i;

	for (i = 0; i < opts.nr_vcpus; i++) {
		runners[i].vcpu = vcpus[i];
		kvm_pthread_create(&runners[i].thread, NULL, runner_fn, &runners[i]);
	}
}

static void join_runners(void)
{
	u32 i;

	for (i = 0; i < opts.nr_vcpus; i++) {
		userfault_wait_until(__atomic_load_n(&runners[i].done, __ATOMIC_ACQUIRE));
		kvm_pthread_join(runners[i].thread, NULL);
	}
}

static void pause_runners(void)
{
	u32 i;

	for (i = 0; i < opts.nr_vcpus; i++)
		WRITE_ONCE(runners[i].pause, true);
	join_runners();
}

static void wait_for_pass_of(struct runner *runner)
{
	u64 end = userfault_now_ms() + USERFAULT_TIMEOUT_SECS * 1000;
	u64 exits = vcpu_get_stat(runner->vcpu, exits);
	u64 pass = READ_ONCE(runner->pass) + 2;
	u64 beat = READ_ONCE(runner->beat);

	while (READ_ONCE(runner->pass) < pass) {
		TEST_ASSERT(userfault_now_ms() < end,
			    "vCPU %u is in pass %lu, after %lu more beats and %lu exits, state %c",
			    runner->vcpu->id, runner->pass + 1, runner->beat - beat,
			    vcpu_get_stat(runner->vcpu, exits) - exits,
			    task_state(getpid(), runner->tid));
		usleep(100);
	}
}

/* Let each vCPU visit all of its pages, from now on, at least once. */
static void wait_for_pass(void)
{
	u32 i;

	for (i = 0; i < opts.nr_vcpus; i++)
		wait_for_pass_of(&runners[i]);
}

/*
 * The source.
 */

static int listener;
static struct postcopy_address address;

struct source {
	struct kvm_vm *vm;
	int sock;
	/* Pages that the destination does not have as they are now. */
	unsigned long *stale;
	/* Those of them that are zero. */
	unsigned long *zero;
	void *buf;
	pid_t server;
	bool had_server;
};

static void source_harvest(struct source *source)
{
	struct postcopy_region *region;
	unsigned long *dirty;
	u64 i;

	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
		if (!can_log_dirty_pages(region))
			continue;
		dirty = bitmap_zalloc(region->size / page_size);
		kvm_vm_get_dirty_log(source->vm, region->slot, dirty);
		for (i = 0; i < region->size / page_size; i++) {
			if (test_bit(i, dirty))
				set_bit(region->first + i * page_size / region->unit,
					source->stale);
		}
		free(dirty);
	}
}

static bool page_is_zero(u64 page)
{
	u64 nr = postcopy_page_region(&mem, page)->unit / sizeof(u64);
	u64 *words = postcopy_page_hva(&mem, page);
	u64 i;

	for (i = 0; i < nr; i++) {
		if (READ_ONCE(words[i]))
			return false;
	}

	return true;
}

static void source_send(struct source *source, struct postcopy_message *msg, const void *data)
{
	TEST_ASSERT(postcopy_send(source->sock, msg, data), "The destination is gone");
}

/* The page may be written meanwhile.  It is dirty again, then. */
static void source_send_page(struct source *source, u64 page)
{
	u64 unit = postcopy_page_region(&mem, page)->unit;
	struct postcopy_message msg = {
		.type = POSTCOPY_PAGE,
		.arg = page,
		.size = unit,
	};

	memcpy(source->buf, postcopy_page_hva(&mem, page), unit);
	msg.sum = postcopy_hash(page, source->buf, unit);
	source_send(source, &msg, source->buf);
}

/* Returns how many pages are to be sent, from @page on, that are zero. */
static u64 source_count_zero(struct source *source, u64 page, u64 end)
{
	u64 nr = 0;

	while (page + nr < end && test_bit(page + nr, source->stale) &&
	       page_is_zero(page + nr))
		nr++;

	return nr;
}

static void source_send_region(struct source *source, struct postcopy_region *region)
{
	u64 page = region->first, end = page + region->nr;
	struct postcopy_message msg;
	u64 nr, i;

	for (; page < end; page += nr) {
		nr = 1;
		if (!test_bit(page, source->stale))
			continue;

		nr = source_count_zero(source, page, end);
		if (nr) {
			msg = (struct postcopy_message) {
				.type = POSTCOPY_ZERO,
				.arg = page,
				.sum = nr,
			};
			source_send(source, &msg, NULL);
		} else {
			nr = 1;
			source_send_page(source, page);
		}
		for (i = page; i < page + nr; i++)
			clear_bit(i, source->stale);
		report->precopied += nr;
	}
}

static void source_precopy(struct source *source, bool first)
{
	struct postcopy_region *region;

	if (!first)
		source_harvest(source);

	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
		if (!can_log_dirty_pages(region))
			continue;
		if (first)
			vm_mem_region_set_flags(source->vm, region->slot,
						KVM_MEM_LOG_DIRTY_PAGES);
		source_send_region(source, region);
	}
}

static void source_send_bitmaps(struct source *source)
{
	struct postcopy_message msg = {
		.type = POSTCOPY_SWITCH,
		.size = 2 * bitmap_bytes(),
	};
	u64 page;

	for (page = 0; page < mem.nr_pages; page++) {
		if (!test_bit(page, source->stale))
			continue;
		report->stale++;
		if (page_is_zero(page))
			set_bit(page, source->zero);
	}

	memcpy(source->buf, source->stale, bitmap_bytes());
	memcpy(source->buf + bitmap_bytes(), source->zero, bitmap_bytes());
	source_send(source, &msg, source->buf);
}

/* The memory must not be written any more once the last dirty pages are known. */
static void source_switch(struct source *source)
{
	struct postcopy_message msgs[MAX_VCPUS + 1] = { { .type = POSTCOPY_VM } };
	void *states[MAX_VCPUS + 1];
	u64 *state;
	u32 i;

	report->stop_ns = postcopy_now_ns();
	pause_runners();

	for (i = 0; i <= opts.nr_vcpus; i++)
		states[i] = calloc(1, POSTCOPY_MAX_STATE);
	for (i = 1; i <= opts.nr_vcpus; i++) {
		state = states[i];
		state[0] = runners[i - 1].beat;
		state[1] = runners[i - 1].pass;
		msgs[i].type = POSTCOPY_VCPU;
		msgs[i].arg = i - 1;
		msgs[i].size = 16 + arch_save_vcpu(vcpus[i - 1], state + 2);
	}
	msgs[0].size = arch_save_vm(source->vm, states[0]);
	if (opts.rounds)
		source_harvest(source);

	source_send_bitmaps(source);
	for (i = 0; i <= opts.nr_vcpus; i++) {
		source_send(source, &msgs[i], states[i]);
		free(states[i]);
	}
	source_send(source, &(struct postcopy_message) { .type = POSTCOPY_START }, NULL);
}

/* Only the first server fails. */
static void source_fork_server(struct source *source)
{
	enum postcopy_failure failure = source->had_server ? POSTCOPY_NO_FAILURE : opts.failure;
	int sock = postcopy_accept(listener);

	if (source->server)
		waitpid(source->server, NULL, 0);
	source->had_server = true;
	source->server = fork();
	TEST_ASSERT(source->server >= 0, "fork() failed, errno %d", errno);
	if (!source->server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(listener);
		close(source->sock);
		postcopy_serve(sock, &opts, &mem, failure);
		_exit(0);
	}
	close(sock);
}

static void source_send_hashes_of(struct source *source, struct postcopy_region *region,
				  u64 unit)
{
	struct postcopy_message msg = {
		.type = POSTCOPY_HASHES,
		.size = region->size / unit * sizeof(u64),
	};
	u64 *hashes = malloc(msg.size);
	u64 i;

	for (i = 0; i < region->size / unit; i++)
		hashes[i] = postcopy_hash(region->first + i, region->hva + i * unit, unit);
	source_send(source, &msg, hashes);
	free(hashes);
}

/* Of what is moved, and then of what the guest may have changed or not. */
static void source_send_hashes(struct source *source)
{
	struct postcopy_region *region;

	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
		source_send_hashes_of(source, region, region->unit);
		source_send_hashes_of(source, region, page_size);
	}
}

static void source_lose(const char *why)
{
	ksft_print_msg("source: the migration is lost, %s\n", why);
	exit(POSTCOPY_EXIT_LOST);
}

/* Provide page servers until the destination has all, or is gone. */
static void source_supervise(struct source *source)
{
	struct pollfd pollfds[] = {
		{ .fd = source->sock, .events = POLLIN },
		{ .fd = listener, .events = POLLIN },
	};
	struct postcopy_message msg;

	for (;;) {
		/* Servers stop by themselves, when nothing is wanted for a while. */
		if (poll(pollfds, 2, 2 * USERFAULT_TIMEOUT_SECS * 1000) <= 0)
			source_lose("nobody asks for anything");
		if (pollfds[1].revents)
			source_fork_server(source);
		if (!pollfds[0].revents)
			continue;
		if (!postcopy_receive(source->sock, &msg, NULL, 0))
			source_lose("the destination is gone");
		TEST_ASSERT_EQ(msg.type, POSTCOPY_DONE);
		source_send_hashes(source);
		/* It ends when the pager does, and would not survive us. */
		waitpid(source->server, NULL, 0);
		return;
	}
}

static void source_main(void)
{
	struct source source = { .vm = create_vm() };
	struct slice slice;
	u32 i;

	source.stale = bitmap_zalloc(mem.nr_pages);
	source.zero = bitmap_zalloc(mem.nr_pages);
	source.buf = malloc(max(mem.max_unit, 2 * bitmap_bytes()));
	memset(source.stale, 0xff, bitmap_bytes());
	report->nr_pages = mem.nr_pages;

	for (i = 0; i < opts.nr_vcpus; i++) {
		slice = vcpu_slice(i, opts.nr_vcpus, opts.size / page_size);
		arch_setup_kvm_page(vcpus[i], AGENT_GPA + slice.kvm_page * page_size);
	}
	source.sock = postcopy_accept(listener);
	start_runners();
	for (i = 0; i < opts.rounds; i++)
		source_precopy(&source, !i);
	/* Now all hot pages are stale. */
	wait_for_pass();
	source_switch(&source);
	source_supervise(&source);
	kvm_vm_free(source.vm);
}

/*
 * The destination.
 */

struct destination {
	struct kvm_vm *vm;
	int sock;
	unsigned long *present;
	void *buf;
	u64 buf_size;
	/* The VM's state, and then those of vCPUs. */
	void *states[MAX_VCPUS + 1];
	int userfault_fd;
	int uffds[POSTCOPY_MAX_UFFDS];
	u32 nr_uffds;
	/* A pager in a process of its own. */
	pid_t pager;
	int pager_sock;
};

static void dest_receive(struct destination *dest, struct postcopy_message *msg)
{
	TEST_ASSERT(postcopy_receive(dest->sock, msg, dest->buf, dest->buf_size),
		    "The source is gone");
}

/* Without @data the page is zero. */
static void dest_place_early(struct destination *dest, u64 page, const void *data)
{
	u64 unit = postcopy_page_region(&mem, page)->unit;
	void *hva = postcopy_page_hva(&mem, page);

	if (data)
		memcpy(hva, data, unit);
	else
		memset(hva, 0, unit);
	shared->pages[page].hash = postcopy_hash(page, hva, unit);
	set_bit(page, dest->present);
}

static void dest_place_zeroes(struct destination *dest, u64 first, u64 nr)
{
	u64 page;

	for (page = first; page < first + nr; page++)
		dest_place_early(dest, page, NULL);
}

static void dest_note_stale(struct destination *dest)
{
	unsigned long *stale = dest->buf;
	unsigned long *zero = dest->buf + bitmap_bytes();
	struct postcopy_page *p;
	u64 page;

	for (page = 0; page < mem.nr_pages; page++) {
		p = &shared->pages[page];
		TEST_ASSERT(test_bit(page, stale) || test_bit(page, dest->present),
			    "Page %lu was never sent", page);
		p->zero = test_bit(page, stale) && test_bit(page, zero);
		p->state = test_bit(page, stale) ? 0 : POSTCOPY_PLACED;
		shared->remaining += test_bit(page, stale);
	}
	TEST_ASSERT(shared->remaining, "There is nothing left to do");
}

static bool is_stale(u64 page)
{
	return page < mem.nr_pages && !(shared->pages[page].state & POSTCOPY_PLACED);
}

/* All pages at once, and then those that are here are cleared, by the bitmap. */
static void dest_arm(struct destination *dest)
{
	struct postcopy_region *region;
	u64 page;
	u8 *bitmap;

	if (opts.mode == POSTCOPY_BOTH)
		vm_userfault_enable(dest->vm);
	else if (opts.mode == POSTCOPY_ASYNC)
		vm_userfault_enable_async(dest->vm, KVM_USERFAULT_ASYNC_VCPU);
	else
		vm_userfault_enable_async(dest->vm, 0);
	dest->userfault_fd = vm_create_userfault_fd(dest->vm);

	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
		vm_userfault_arm(dest->vm, region->gpa, region->size);
		bitmap = postcopy_map_bitmap(dest->userfault_fd, region);
		for (page = region->first; page < region->first + region->nr; page++) {
			if (!is_stale(page))
				postcopy_clear_bits(bitmap, region, page);
		}
		postcopy_unmap_bitmap(bitmap, region);
	}
}

/* Userfaultfd can stop accesses only if there is no page. */
static void dest_drop(struct postcopy_region *region, u64 first, u64 nr)
{
	u64 offset = (first - region->first) * region->unit;
	u64 size = nr * region->unit;

	if (region->fd >= 0)
		kvm_fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      offset, size);
	else
		kvm_madvise(region->hva + offset, size, MADV_DONTNEED);
}

static void dest_drop_stale(void)
{
	struct postcopy_region *region;
	u64 page, end, last;

	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
		last = region->first + region->nr;
		for (page = region->first; page < last; page = end + 1) {
			for (end = page; end < last && is_stale(end); end++)
				;
			if (end > page)
				dest_drop(region, page, end - page);
		}
	}
}

static u64 uffd_features(void)
{
	if (is_hugetlb(opts.src))
		return UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MISSING_SHMEM;
	if (opts.src == VM_MEM_SRC_GUEST_MEMFD)
		return UFFD_FEATURE_MISSING_GUEST_MEMFD | UFFD_FEATURE_MISSING_SHMEM;

	return UFFD_FEATURE_MISSING_SHMEM;
}

/* A part of all pages for each, see struct postcopy_pager. */
static void dest_register(struct destination *dest)
{
	struct postcopy_region *region;
	u64 first, end;
	u32 i;

	dest->nr_uffds = opts.mode == POSTCOPY_UFFD_VCPU ? opts.nr_vcpus : 1;
	for (i = 0; i < dest->nr_uffds; i++) {
		dest->uffds[i] = uffd_open(uffd_features());
		for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
			first = max(DIV_ROUND_UP(i * mem.nr_pages, dest->nr_uffds),
				    region->first);
			end = min(DIV_ROUND_UP((i + 1) * mem.nr_pages, dest->nr_uffds),
				  region->first + region->nr);
			if (first < end)
				uffd_register(dest->uffds[i], region->hva +
					      (first - region->first) * region->unit,
					      (end - first) * region->unit,
					      UFFDIO_REGISTER_MODE_MISSING);
		}
	}
}

static void dest_prepare(struct destination *dest)
{
	dest_note_stale(dest);
	if (postcopy_uses_userfault(&opts))
		dest_arm(dest);
	if (postcopy_uses_uffd(&opts)) {
		dest_drop_stale();
		dest_register(dest);
	}
}

/* Files go along in this order. */
struct pager_setup {
	struct postcopy_memory mem;
	bool has_userfault_fd;
	bool has_fds[POSTCOPY_NR_REGIONS];
	u32 nr_uffds;
};

static void pager_process(int sock, int asked)
{
	struct postcopy_region *region;
	struct pager_setup setup;
	int fds[POSTCOPY_MAX_UFFDS + 3];
	int *fd = fds;
	u32 i;

	TEST_ASSERT_EQ(recv(sock, &setup, sizeof(setup), MSG_WAITALL), sizeof(setup));
	receive_fds(sock, fds, setup.has_userfault_fd + setup.has_fds[0] + setup.has_fds[1] +
		    setup.nr_uffds);

	pager.mem = setup.mem;
	pager.asked_fd = asked;
	pager.userfault_fd = setup.has_userfault_fd ? *fd++ : -1;
	for (i = 0; i < POSTCOPY_NR_REGIONS; i++) {
		region = &pager.mem.regions[i];
		region->hva = NULL;
		if (setup.has_fds[i])
			region->hva = kvm_mmap(region->size, PROT_READ | PROT_WRITE,
					       MAP_SHARED, *fd++);
	}
	pager.nr_uffds = setup.nr_uffds;
	memcpy(pager.uffds, fd, setup.nr_uffds * sizeof(*fd));
	postcopy_pager_start(&pager);
	tell(sock);

	/* Nothing comes, but the end. */
	TEST_ASSERT_EQ(recv(sock, &setup, 1, 0), 0);
	postcopy_pager_stop(&pager);
}

/* Before there is a VM. */
static void dest_fork_pager(struct destination *dest)
{
	int socks[2], pipes[2];

	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, socks),
		    "socketpair() failed, errno %d", errno);
	TEST_ASSERT(!pipe2(pipes, O_CLOEXEC), "pipe2() failed, errno %d", errno);
	dest->pager = fork();
	TEST_ASSERT(dest->pager >= 0, "fork() failed, errno %d", errno);
	if (!dest->pager) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(dest->sock);
		close(socks[0]);
		close(pipes[1]);
		pager_process(socks[1], pipes[0]);
		_exit(0);
	}
	close(socks[1]);
	close(pipes[0]);
	dest->pager_sock = socks[0];
	asked_fd = pipes[1];
}

static void dest_start_external_pager(struct destination *dest)
{
	struct pager_setup setup = {
		.mem = mem,
		.has_userfault_fd = dest->userfault_fd >= 0,
		.nr_uffds = dest->nr_uffds,
	};
	int fds[POSTCOPY_MAX_UFFDS + 3];
	int *fd = fds;
	u32 i;

	if (setup.has_userfault_fd)
		*fd++ = dest->userfault_fd;
	for (i = 0; i < POSTCOPY_NR_REGIONS; i++) {
		setup.has_fds[i] = mem.regions[i].fd >= 0;
		if (setup.has_fds[i])
			*fd++ = mem.regions[i].fd;
	}
	for (i = 0; i < dest->nr_uffds; i++)
		*fd++ = dest->uffds[i];

	TEST_ASSERT_EQ(send(dest->pager_sock, &setup, sizeof(setup), MSG_NOSIGNAL),
		       sizeof(setup));
	send_fds(dest->pager_sock, fds, fd - fds);
	hear(dest->pager_sock);

	/* If the pager dies, nothing must wait any more. */
	if (dest->userfault_fd >= 0)
		kvm_free_fd(dest->userfault_fd);
}

static void dest_start_pager(struct destination *dest)
{
	if (opts.external_pager)
		return dest_start_external_pager(dest);

	pager.mem = mem;
	pager.asked_fd = -1;
	pager.userfault_fd = dest->userfault_fd;
	pager.nr_uffds = dest->nr_uffds;
	memcpy(pager.uffds, dest->uffds, sizeof(dest->uffds));
	postcopy_pager_start(&pager);
}

/* One that the guest has changed since it came. */
static u64 dest_late_page(void)
{
	u64 i = 0;

	while (page_kind(i) != PAGE_HOT)
		i++;

	return postcopy_gpa_page(&mem, AGENT_GPA + i * page_size);
}

static void dest_stop_pager(struct destination *dest)
{
	int status;
	u32 i;

	shared->late_page = dest_late_page();
	if (postcopy_uses_userfault(&opts))
		vm_userfault_disable(dest->vm);

	if (opts.external_pager) {
		close(dest->pager_sock);
		userfault_wait_until(waitpid(dest->pager, &status, WNOHANG) == dest->pager);
		TEST_ASSERT(!status, "The pager failed, status %#x", status);
	} else {
		postcopy_pager_stop(&pager);
	}

	for (i = 0; i < dest->nr_uffds; i++)
		close(dest->uffds[i]);
}

/* KVM already needs pages for that. */
static void dest_run(struct destination *dest)
{
	u64 *state;
	u32 i;

	dest_start_pager(dest);
	arch_load_vm(dest->vm, dest->states[0]);
	for (i = 0; i < opts.nr_vcpus; i++) {
		state = dest->states[i + 1];
		runners[i].beat = state[0];
		runners[i].pass = state[1];
		arch_load_vcpu(vcpus[i], state + 2);
	}
	report->run_ns = postcopy_now_ns();
	start_runners();
	WRITE_ONCE(shared->started, 1);
}

static void dest_keep_state(struct destination *dest, u64 nr, u64 size)
{
	TEST_ASSERT(nr <= opts.nr_vcpus, "State of vCPU %lu", nr - 1);
	dest->states[nr] = malloc(size);
	memcpy(dest->states[nr], dest->buf, size);
}

/* Until the destination is in charge. */
static void dest_precopy(struct destination *dest)
{
	struct postcopy_message msg;

	for (;;) {
		dest_receive(dest, &msg);
		switch (msg.type) {
		case POSTCOPY_PAGE:
			TEST_ASSERT_EQ(msg.size, postcopy_page_region(&mem, msg.arg)->unit);
			dest_place_early(dest, msg.arg, dest->buf);
			break;
		case POSTCOPY_ZERO:
			dest_place_zeroes(dest, msg.arg, msg.sum);
			break;
		case POSTCOPY_SWITCH:
			TEST_ASSERT_EQ(msg.size, 2 * bitmap_bytes());
			dest_prepare(dest);
			break;
		case POSTCOPY_VM:
			dest_keep_state(dest, 0, msg.size);
			break;
		case POSTCOPY_VCPU:
			dest_keep_state(dest, msg.arg + 1, msg.size);
			break;
		case POSTCOPY_START:
			return;
		default:
			TEST_FAIL("Unexpected message %u", msg.type);
		}
	}
}

/* It may sleep for another reason, but not for long. */
static bool runner_is_stuck(struct runner *runner)
{
	u64 beat = READ_ONCE(runner->beat);

	if (__atomic_load_n(&runner->done, __ATOMIC_ACQUIRE))
		return true;
	usleep(20000);

	return postcopy_uses_uffd(&opts) && READ_ONCE(runner->beat) == beat &&
	       task_is_asleep(getpid(), READ_ONCE(runner->tid));
}

/*
 * Each vCPU has pages that are lost.  It may finish the pass that it was in, but not the
 * next one.
 */
static void dest_check_lost(struct destination *dest, u32 i)
{
	u64 *state = dest->states[i + 1];

	userfault_wait_until(runner_is_stuck(&runners[i]));
	TEST_ASSERT(!runners[i].done || runners[i].lost, "vCPU %u did not fail", i);
	TEST_ASSERT(READ_ONCE(runners[i].pass) <= state[1] + 1,
		    "vCPU %u has done pass %lu without its pages", i, runners[i].pass);
}

/* The guest has stopped, not having got any page that is not filled. */
static void dest_lose(struct destination *dest)
{
	u32 i, nr_failed = 0;

	for (i = 0; i < opts.nr_vcpus; i++) {
		dest_check_lost(dest, i);
		nr_failed += runners[i].done;
	}
	report->lost = shared->remaining;
	ksft_print_msg("destination: %lu of %lu pages are lost, %u vCPUs have failed, %u wait\n",
		       report->lost, report->stale, nr_failed, opts.nr_vcpus - nr_failed);

	/* Nothing but the end of the process gets vCPUs out of userfaultfd. */
	if (postcopy_uses_queue(&opts)) {
		join_runners();
		dest_stop_pager(dest);
	}
	_exit(POSTCOPY_EXIT_LOST);
}

static void print_progress(u32 remaining)
{
	struct postcopy_stats *stats = &shared->stats;

	printf("# %4lu ms: %lu of %lu pages placed, %lu asked for, %lu streamed, window %lu\n",
	       (postcopy_now_ns() - report->run_ns) / 1000000, report->stale - remaining,
	       report->stale, stats->asked, stats->streamed, stats->window);
	report->nr_progress++;
}

static void dest_wait_for_pages(struct destination *dest)
{
	struct timespec interval = { .tv_nsec = 100000000 };
	u64 end = userfault_now_ms() + USERFAULT_TIMEOUT_SECS * 1000;
	u32 remaining, last = 0;

	while ((remaining = __atomic_load_n(&shared->remaining, __ATOMIC_ACQUIRE))) {
		if (__atomic_load_n(&shared->lost, __ATOMIC_ACQUIRE))
			dest_lose(dest);
		if (remaining != last)
			end = userfault_now_ms() + USERFAULT_TIMEOUT_SECS * 1000;
		TEST_ASSERT(userfault_now_ms() < end, "%u pages do not come", remaining);
		last = remaining;
		if (opts.progress)
			print_progress(remaining);
		syscall(__NR_futex, &shared->remaining, FUTEX_WAIT, remaining, &interval,
			NULL, 0);
	}
	report->placed_ns = postcopy_now_ns();
	if (opts.progress)
		print_progress(0);
}

/* In dest->buf. */
static void dest_receive_hashes(struct destination *dest, u64 nr)
{
	struct postcopy_message msg;

	dest_receive(dest, &msg);
	TEST_ASSERT_EQ(msg.type, POSTCOPY_HASHES);
	TEST_ASSERT_EQ(msg.size, nr * sizeof(u64));
}

/* Of a region, what the guest may have written by now. */
static unsigned long *dest_find_changed(struct destination *dest,
					struct postcopy_region *region)
{
	u64 nr = region->size / page_size;
	unsigned long *changed = bitmap_zalloc(nr);
	u64 i;

	if (region->slot != AGENT_SLOT) {
		kvm_vm_get_dirty_log(dest->vm, region->slot, changed);
		return changed;
	}

	for (i = 0; i < nr; i++) {
		if (page_kind(i) == PAGE_HOT || i >= nr - opts.nr_vcpus)
			set_bit(i, changed);
	}

	return changed;
}

/*
 * What the guest has not changed is, in memory, as it was at the source.  Each huge page
 * has something that it changes, so this is about small ones.
 */
static void dest_check_memory(struct destination *dest, struct postcopy_region *region)
{
	u64 i, nr = region->size / page_size;
	unsigned long *differs = bitmap_zalloc(nr);
	unsigned long *changed;
	u64 *hashes = dest->buf;
	u64 nr_checked = 0;

	dest_receive_hashes(dest, nr);
	for (i = 0; i < nr; i++) {
		if (postcopy_hash(region->first + i, region->hva + i * page_size,
				  page_size) != hashes[i])
			set_bit(i, differs);
	}

	/* Not before all pages are hashed: what is written meanwhile is found as well. */
	changed = dest_find_changed(dest, region);
	for (i = 0; i < nr; i++) {
		if (test_bit(i, changed))
			continue;
		TEST_ASSERT(!test_bit(i, differs), "Page %lu of slot %u has changed", i,
			    region->slot);
		nr_checked++;
	}
	TEST_ASSERT(nr_checked, "The guest has changed all of slot %u", region->slot);
	free(differs);
	free(changed);
}

static void dest_check_region(struct destination *dest, struct postcopy_region *region)
{
	u64 *hashes = dest->buf;
	u64 i, page;

	dest_receive_hashes(dest, region->nr);
	for (i = 0; i < region->nr; i++) {
		page = region->first + i;
		TEST_ASSERT(shared->pages[page].hash == hashes[i],
			    "Page %lu is not what it was at the source", page);
		report->hash = report->hash * 31 + hashes[i];
	}
	dest_check_memory(dest, region);
}

static void dest_check_hashes(struct destination *dest)
{
	struct postcopy_region *region;

	TEST_ASSERT(postcopy_send_arg(dest->sock, POSTCOPY_DONE, 0), "The source is gone");
	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++)
		dest_check_region(dest, region);
}

/* Nothing may be left that only KVM_USERFAULT_DISABLE would have an effect on. */
static void dest_check_userfault(struct destination *dest)
{
	struct postcopy_region *region;
	u64 page;
	u8 *bitmap;
	int fd;

	if (!postcopy_uses_userfault(&opts))
		return;

	fd = vm_create_userfault_fd(dest->vm);
	TEST_ASSERT_EQ(userfault_get_counts(fd).waiting, 0);
	for (region = mem.regions; region < mem.regions + POSTCOPY_NR_REGIONS; region++) {
		bitmap = postcopy_map_bitmap(fd, region);
		for (page = region->first; page < region->first + region->nr; page++)
			TEST_ASSERT(!postcopy_count_bits(bitmap, region, page),
				    "Page %lu is still armed", page);
		postcopy_unmap_bitmap(bitmap, region);
	}
	close(fd);
}

static int compare_u64(const void *a, const void *b)
{
	u64 x = *(const u64 *)a, y = *(const u64 *)b;

	return x < y ? -1 : x > y;
}

/*
 * What was sent because somebody asked for it has taken the way there and back.  There
 * is such a page: nothing is streamed before the first one is asked for.
 */
static void check_latencies(void)
{
	struct postcopy_page *p;
	u64 least = ~0ull;

	for (p = shared->pages; p < shared->pages + mem.nr_pages; p++) {
		if (p->sent_at_once && p->latency_ns && !p->nr_wrong)
			least = min(least, p->latency_ns);
	}

	TEST_ASSERT(opts.failure || least != ~0ull, "No page was sent at once");
	TEST_ASSERT(least >= 2 * opts.latency_us * 1000, "A page came after %lu us",
		    least / 1000);
}

static void report_latencies(void)
{
	u64 *latencies = malloc(mem.nr_pages * sizeof(u64));
	u64 page, nr = 0;

	for (page = 0; page < mem.nr_pages; page++) {
		if (shared->pages[page].latency_ns)
			latencies[nr++] = shared->pages[page].latency_ns;
	}
	TEST_ASSERT(nr, "No page was asked for");

	qsort(latencies, nr, sizeof(u64), compare_u64);
	report->latency_p50_ns = latencies[nr / 2];
	report->latency_p99_ns = latencies[nr * 99 / 100];
	report->latency_max_ns = latencies[nr - 1];
	free(latencies);
	check_latencies();
}

/* Whether it does so at the right times is for check_window(). */
static void dest_check_window(struct postcopy_stats *stats)
{
	/* See pager_max_outstanding(). */
	bool certain = mem.max_unit == page_size;

	if (certain || stats->streamed)
		TEST_ASSERT(stats->window_grown && stats->max_window > POSTCOPY_MIN_WINDOW,
			    "The window has not grown");
	if (certain || stats->window_faults)
		TEST_ASSERT(stats->window_shrunk, "The window has not shrunk, by %lu faults",
			    stats->window_faults);
}

static void dest_check_stats(struct destination *dest)
{
	struct postcopy_stats *stats = &report->stats;
	u32 i;

	*stats = shared->stats;
	TEST_ASSERT_EQ(stats->zero + stats->asked + stats->streamed, report->stale);
	/* Huge pages are few, and all different. */
	if (mem.max_unit == page_size)
		TEST_ASSERT(stats->zero && stats->streamed, "%lu pages zero, %lu streamed",
			    stats->zero, stats->streamed);
	dest_check_window(stats);
	if (postcopy_uses_uffd(&opts))
		TEST_ASSERT(stats->uffd_events, "Userfaultfd has not seen any access");
	if (!postcopy_uses_userfault(&opts))
		return;

	for (i = 0; i < opts.nr_vcpus; i++)
		report->kvm_exits += vcpu_get_stat(vcpus[i], userfault_exits);
	report->kvm_records = vm_get_stat(dest->vm, userfault_records);

	/* Whose page has come before the record is read has none any more. */
	TEST_ASSERT_EQ(stats->exits, report->kvm_exits);
	TEST_ASSERT(stats->records <= report->kvm_records, "%lu records of %lu were read",
		    stats->records, report->kvm_records);
	/* KVM has needed at least the pages that it updates. */
	TEST_ASSERT_EQ(!!report->kvm_records, postcopy_uses_queue(&opts));
	TEST_ASSERT_EQ(!!report->kvm_exits, opts.mode != POSTCOPY_ASYNC);
}

/* Where the memory is huge, so are the mappings, as if nothing had happened. */
static void dest_check_huge_mappings(struct destination *dest)
{
	bool known = arch_get_huge_mappings(dest->vm, &report->huge_mappings);
	bool thp = opts.src == VM_MEM_SRC_ANONYMOUS_THP;
	bool huge = is_hugetlb(opts.src) || (thp && is_thp(mem.regions[1].hva, opts.size));

	if (!is_hugetlb(opts.src) && !thp)
		return;

	report->huge_unknown = !huge || !known;
	if (report->huge_unknown) {
		ksft_print_msg("Huge mappings are not checked, %s\n",
			       huge ? "the kernel does not tell" : "the memory is not huge");
		return;
	}

	report->huge_blocks = opts.size / SZ_2M;
	TEST_ASSERT(report->huge_mappings >= report->huge_blocks,
		    "%lu blocks are mapped by huge pages, of %lu", report->huge_mappings,
		    report->huge_blocks);
}

static void dest_main(void)
{
	struct destination dest = { .userfault_fd = -1 };

	dest.sock = postcopy_connect(&address);
	TEST_ASSERT(dest.sock >= 0, "There is no source");
	/* Slot 0 is small. */
	shared = postcopy_shared_alloc((opts.size + SZ_256M) / page_size);
	shared->vmm_pid = getpid();
	pager.opts = &opts;
	pager.address = &address;
	pager.shared = shared;
	if (opts.external_pager)
		dest_fork_pager(&dest);

	dest.vm = create_vm();
	TEST_ASSERT(mem.nr_pages <= shared->max_pages, "Too many pages");
	/* See dest_find_changed(). */
	vm_mem_region_set_flags(dest.vm, 0, KVM_MEM_LOG_DIRTY_PAGES);
	dest.present = bitmap_zalloc(mem.nr_pages);
	dest.buf_size = max(mem.max_unit, max(shared->max_pages * sizeof(u64),
					      (u64)POSTCOPY_MAX_STATE));
	dest.buf = malloc(dest.buf_size);

	dest_precopy(&dest);
	dest_run(&dest);
	dest_wait_for_pages(&dest);
	/* The guest gets on even if nobody does anything else for it. */
	dest_check_hashes(&dest);
	wait_for_pass();
	dest_check_userfault(&dest);
	dest_stop_pager(&dest);
	report_latencies();

	/* Nor has it lost anything. */
	wait_for_pass();
	pause_runners();
	dest_check_stats(&dest);
	dest_check_huge_mappings(&dest);
	kvm_vm_free(dest.vm);
}

/*
 * The rule for the window.
 */

static void window_stream(struct postcopy_window *window, u64 nr)
{
	while (nr--)
		postcopy_window_streamed(window);
}

static void check_window(void)
{
	struct postcopy_window window;
	u64 size;

	/* It doubles when as many pages have come as there is room for. */
	postcopy_window_reset(&window);
	for (size = POSTCOPY_MIN_WINDOW; size < POSTCOPY_MAX_WINDOW; size *= 2) {
		TEST_ASSERT_EQ(window.size, size);
		window_stream(&window, size - 1);
		TEST_ASSERT_EQ(window.size, size);
		window_stream(&window, 1);
	}
	window_stream(&window, 2 * POSTCOPY_MAX_WINDOW);
	TEST_ASSERT_EQ(window.size, POSTCOPY_MAX_WINDOW);

	/* A fault cuts it in half, and what has come before that doesn't count any more. */
	for (size = POSTCOPY_MAX_WINDOW / 2; size >= POSTCOPY_MIN_WINDOW; size /= 2) {
		window_stream(&window, 2 * size - 1);
		postcopy_window_fault(&window);
		TEST_ASSERT_EQ(window.size, size);
	}
	postcopy_window_fault(&window);
	TEST_ASSERT_EQ(window.size, POSTCOPY_MIN_WINDOW);
}

/*
 * The test.
 */

static pid_t fork_vmm(void (*fn)(void))
{
	pid_t pid;

	fflush(stdout);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed, errno %d", errno);
	if (pid)
		return pid;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	fn();
	fflush(stdout);
	_exit(0);
}

/* No connection must be possible any more when the source is gone. */
static void dest_process(void)
{
	close(listener);
	dest_main();
}

/*
 * Who waits for the other side gives up sooner, and says for what.  The settings grant
 * the whole program more if the memory is not larger than by default.
 */
static u64 migration_timeout_ms(void)
{
	return (3 * USERFAULT_TIMEOUT_SECS + opts.size / SZ_1M) * 1000;
}

static bool wait_for_process(pid_t pid, u64 end, int *status)
{
	while (waitpid(pid, status, WNOHANG) != pid) {
		if (userfault_now_ms() > end) {
			kill(pid, SIGKILL);
			waitpid(pid, status, 0);
			return false;
		}
		usleep(2000);
	}

	return true;
}

#define EXITED(code)	((code) << 8)

static int expected_source_status(void)
{
	switch (opts.failure) {
	case POSTCOPY_SOURCE_KILLED:
		return SIGKILL;
	case POSTCOPY_ONLY_WRONG_PAGES:
	case POSTCOPY_DESTINATION_KILLED:
		return EXITED(POSTCOPY_EXIT_LOST);
	default:
		return 0;
	}
}

static int expected_dest_status(void)
{
	switch (opts.failure) {
	case POSTCOPY_DESTINATION_KILLED:
		return SIGKILL;
	case POSTCOPY_ONLY_WRONG_PAGES:
	case POSTCOPY_SOURCE_KILLED:
		return EXITED(POSTCOPY_EXIT_LOST);
	default:
		return 0;
	}
}

/* Whether that what was to go wrong did. */
static bool check_failure(void)
{
	struct postcopy_stats *stats = &report->stats;

	switch (opts.failure) {
	case POSTCOPY_NO_FAILURE:
		return !stats->reconnects && !stats->duplicates && !stats->wrong;
	case POSTCOPY_SERVER_KILLED:
	case POSTCOPY_CONNECTION_CUT:
		return stats->reconnects == 1;
	case POSTCOPY_DUPLICATE_PAGES:
		return stats->duplicates;
	case POSTCOPY_WRONG_PAGES:
		return stats->wrong;
	case POSTCOPY_ONLY_WRONG_PAGES:
	case POSTCOPY_SOURCE_KILLED:
		return report->lost;
	default:
		return true;
	}
}

static bool run_migration(void)
{
	u64 end = userfault_now_ms() + migration_timeout_ms();
	int source_status, dest_status;
	pid_t source, dest;
	bool ended;

	memset(report, 0, sizeof(*report));
	listener = postcopy_listen(opts.tcp, &address);
	source = fork_vmm(source_main);
	dest = fork_vmm(dest_process);
	close(listener);

	ended = wait_for_process(dest, end, &dest_status);
	ended &= wait_for_process(source, end, &source_status);
	if (!ended)
		ksft_print_msg("It did not end\n");
	if (WIFEXITED(dest_status) && WEXITSTATUS(dest_status) == KSFT_SKIP)
		exit(KSFT_SKIP);
	if (source_status != expected_source_status() || dest_status != expected_dest_status()) {
		ksft_print_msg("Source: status %#x, expected %#x; destination: %#x, %#x\n",
			       source_status, expected_source_status(), dest_status,
			       expected_dest_status());
		return false;
	}
	if (opts.progress && !report->nr_progress) {
		ksft_print_msg("No progress was reported\n");
		return false;
	}
	if (!check_failure())
		ksft_print_msg("%lu reconnects, %lu duplicate and %lu wrong pages\n",
			       report->stats.reconnects, report->stats.duplicates,
			       report->stats.wrong);

	return ended && check_failure();
}

static u64 report_us(u64 from_ns, u64 to_ns)
{
	return (to_ns - from_ns) / 1000;
}

static void print_report(void)
{
	struct postcopy_stats *stats = &report->stats;

	ksft_print_msg("mode %s, %s%s, %lu MiB, %u vCPUs, latency %lu us\n",
		       mode_names[opts.mode], vm_mem_backing_src_alias(opts.src)->name,
		       opts.external_pager ? ", external pager" : "", opts.size / SZ_1M,
		       opts.nr_vcpus, opts.latency_us);
	ksft_print_msg("blackout                  %10lu us\n",
		       report_us(report->stop_ns, report->run_ns));
	ksft_print_msg("first heartbeat           %10lu us\n",
		       report_us(report->stop_ns, report->beat_ns));
	ksft_print_msg("all pages placed          %10lu us\n",
		       report_us(report->stop_ns, report->placed_ns));
	ksft_print_msg("pages pre-copied          %10lu\n", report->precopied);
	ksft_print_msg("pages left                %10lu of %lu\n", report->stale,
		       report->nr_pages);
	ksft_print_msg("  zero, not sent          %10lu\n", stats->zero);
	ksft_print_msg("  asked for               %10lu\n", stats->asked);
	ksft_print_msg("  streamed                %10lu, window up to %lu, shrunk %lu times\n",
		       stats->streamed, stats->max_window, stats->window_shrunk);
	ksft_print_msg("faults                    %10lu: %lu exits, %lu records, %lu uffd\n",
		       stats->exits + stats->records + stats->uffd_events, stats->exits,
		       stats->records, stats->uffd_events);
	ksft_print_msg("fault latency p50         %10lu us\n", report->latency_p50_ns / 1000);
	ksft_print_msg("fault latency p99         %10lu us\n", report->latency_p99_ns / 1000);
	ksft_print_msg("fault latency max         %10lu us\n", report->latency_max_ns / 1000);
	if (report->huge_unknown)
		ksft_print_msg("huge mappings                not checked\n");
	if (report->huge_blocks)
		ksft_print_msg("huge mappings             %10lu of %lu blocks\n",
			       report->huge_mappings, report->huge_blocks);
	ksft_print_msg("hash of the memory        %#lx\n", report->hash);
}

static void write_json(FILE *f)
{
	struct postcopy_stats *stats = &report->stats;

	fprintf(f, "{\"mode\":\"%s\",\"backing\":\"%s\",\"external_pager\":%s,\"tcp\":%s,",
		mode_names[opts.mode], vm_mem_backing_src_alias(opts.src)->name,
		opts.external_pager ? "true" : "false", opts.tcp ? "true" : "false");
	fprintf(f, "\"bytes\":%lu,\"vcpus\":%u,\"rounds\":%u,\"latency_us\":%lu,", opts.size,
		opts.nr_vcpus, opts.rounds, opts.latency_us);
	fprintf(f, "\"blackout_us\":%lu,\"first_beat_us\":%lu,\"completion_us\":%lu,",
		report_us(report->stop_ns, report->run_ns),
		report_us(report->stop_ns, report->beat_ns),
		report_us(report->stop_ns, report->placed_ns));
	fprintf(f, "\"pages\":%lu,\"precopied\":%lu,\"stale\":%lu,\"zero\":%lu,",
		report->nr_pages, report->precopied, report->stale, stats->zero);
	fprintf(f, "\"asked\":%lu,\"streamed\":%lu,\"max_window\":%lu,", stats->asked,
		stats->streamed, stats->max_window);
	fprintf(f, "\"exits\":%lu,\"records\":%lu,\"uffd_events\":%lu,", stats->exits,
		stats->records, stats->uffd_events);
	fprintf(f, "\"fault_p50_us\":%lu,\"fault_p99_us\":%lu,\"fault_max_us\":%lu,",
		report->latency_p50_ns / 1000, report->latency_p99_ns / 1000,
		report->latency_max_ns / 1000);
	fprintf(f, "\"huge_mappings\":%lu,\"huge_blocks\":%lu,\"hash\":\"%#lx\"}\n",
		report->huge_mappings, report->huge_blocks, report->hash);
}

/* Whoever reads the line looks for these by their names. */
static const char * const figures[] = {
	"bytes", "vcpus", "rounds", "latency_us", "blackout_us", "first_beat_us",
	"completion_us", "pages", "precopied", "stale", "zero", "asked", "streamed",
	"max_window", "exits", "records", "uffd_events", "fault_p50_us", "fault_p99_us",
	"fault_max_us", "huge_mappings", "huge_blocks",
};

static void check_json(const char *json)
{
	char key[64];
	char *figure;
	int i;

	TEST_ASSERT(!strncmp(json, "{\"mode\":\"", 9), "The mode is not first in %s", json);
	for (i = 0; i < ARRAY_SIZE(figures); i++) {
		snprintf(key, sizeof(key), ",\"%s\":", figures[i]);
		figure = strstr(json, key);
		TEST_ASSERT(figure && isdigit(figure[strlen(key)]), "No figure %s in %s",
			    figures[i], json);
	}
}

static void report_json(bool print)
{
	char *json = NULL;
	size_t size;
	FILE *f = open_memstream(&json, &size);

	TEST_ASSERT(f, "open_memstream() failed, errno %d", errno);
	write_json(f);
	TEST_ASSERT(!fclose(f), "fclose() failed, errno %d", errno);

	check_json(json);
	if (print)
		fputs(json, stdout);
	free(json);
}

static void test_migration(enum postcopy_failure failure, bool json)
{
	struct postcopy_options saved = opts;
	bool passed;

	opts.failure = failure;
	if (failure) {
		opts.progress = false;
		opts.rounds = min_t(u32, opts.rounds, 1);
		opts.size = min_t(u64, opts.size,
				  align_up(FAILURE_SIZE, get_backing_src_pagesz(opts.src)));
	}
	passed = run_migration();
	ksft_test_result(passed, "%s %s\n", mode_names[opts.mode], failure_names[failure]);
	if (passed && !failure) {
		print_report();
		report_json(json);
	}
	opts = saved;
}

static int parse_name(const char *name, const char * const *names, int nr)
{
	int i;

	for (i = 0; i < nr; i++) {
		if (!strcmp(name, names[i]))
			return i;
	}

	TEST_FAIL("There is no '%s'", name);
	return -1;
}

static void help(const char *name)
{
	int i;

	printf("usage: %s [-h] [-m mode] [-t test] [-s source] [-e] [-b size] [-v vCPUs]\n"
	       "          [-r rounds] [-l usec] [-n] [-p] [-j]\n\n", name);
	printf(" -m: what stops accesses to pages that are not there:\n");
	for (i = 0; i < NR_POSTCOPY_MODES; i++)
		printf("     %s\n", mode_names[i]);
	printf(" -t: do this test only:\n");
	for (i = 0; i < NR_POSTCOPY_FAILURES; i++)
		printf("     %s\n", failure_names[i]);
	backing_src_help("-s");
	printf(" -e: the pager is a process of its own\n");
	printf(" -b: size of the memory, e.g. 16M\n");
	printf(" -v: number of vCPUs\n");
	printf(" -r: how many times pages are copied while the source runs\n");
	printf(" -l: time that pages, and what asks for them, take for one way\n");
	printf(" -n: use TCP\n");
	printf(" -p: report the progress\n");
	printf(" -j: report the result as a line of JSON\n");
	exit(0);
}

static void check_requirements(void)
{
	bool is_shared = backing_src_is_shared(opts.src);
	u64 flags = KVM_USERFAULT_ENABLE;
	u64 unit = get_backing_src_pagesz(opts.src);
	int uffd;

	__TEST_REQUIRE(kvm_arch_has_default_irqchip(), "No interrupt controller");
	if (opts.mode == POSTCOPY_USERFAULT)
		flags |= KVM_USERFAULT_ASYNC;
	if (opts.mode == POSTCOPY_ASYNC)
		flags |= KVM_USERFAULT_ASYNC | KVM_USERFAULT_ASYNC_VCPU;
	if (postcopy_uses_userfault(&opts))
		TEST_REQUIRE((kvm_check_cap(KVM_CAP_USERFAULT) & flags) == flags);
	if (postcopy_uses_uffd(&opts)) {
		uffd = __uffd_open(uffd_features());
		__TEST_REQUIRE(uffd >= 0, "userfaultfd can't do it");
		close(uffd);
	}

	__TEST_REQUIRE(!opts.external_pager || postcopy_uses_uffd(&opts) || is_shared,
		       "A pager in another process needs shared memory");
	__TEST_REQUIRE(postcopy_uses_userfault(&opts) || opts.src != VM_MEM_SRC_GUEST_MEMFD,
		       "Userfaultfd can't stop vCPUs that use a guest_memfd");
	if (opts.src == VM_MEM_SRC_GUEST_MEMFD)
		TEST_REQUIRE(kvm_has_mappable_guest_memfd());
	if (is_hugetlb(opts.src))
		__TEST_REQUIRE(has_hugetlb(unit, 2 * opts.size / unit), "Too few huge pages");
}

int main(int argc, char *argv[])
{
	int only = -1, opt, i;
	bool json = false;

	while ((opt = getopt(argc, argv, "hm:t:s:eb:v:r:l:npj")) != -1) {
		switch (opt) {
		case 'm':
			opts.mode = parse_name(optarg, mode_names, NR_POSTCOPY_MODES);
			break;
		case 't':
			only = parse_name(optarg, failure_names, NR_POSTCOPY_FAILURES);
			break;
		case 's':
			opts.src = parse_backing_src_type(optarg);
			break;
		case 'e':
			opts.external_pager = true;
			break;
		case 'b':
			opts.size = parse_size(optarg);
			break;
		case 'v':
			opts.nr_vcpus = atoi_positive("Number of vCPUs", optarg);
			TEST_ASSERT(opts.nr_vcpus <= MAX_VCPUS, "Too many vCPUs");
			break;
		case 'r':
			opts.rounds = atoi_non_negative("Number of rounds", optarg);
			break;
		case 'l':
			opts.latency_us = atoi_non_negative("Latency", optarg);
			break;
		case 'n':
			opts.tcp = true;
			break;
		case 'p':
			opts.progress = true;
			break;
		case 'j':
			json = true;
			break;
		default:
			help(argv[0]);
		}
	}

	page_size = getpagesize();
	opts.size = align_up(opts.size, get_backing_src_pagesz(opts.src));
	check_requirements();
	check_window();

	/* A page number takes 20 bits, and there are some pages for each vCPU. */
	TEST_ASSERT(opts.size / page_size <= BIT(20) &&
		    opts.size / page_size >= opts.nr_vcpus * 64 &&
		    vcpu_slice(0, opts.nr_vcpus, opts.size / page_size).nr % STRIDE,
		    "Unsupported size");
	report = kvm_mmap(sizeof(*report), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS, -1);

	ksft_print_header();
	ksft_set_plan(only < 0 ? NR_POSTCOPY_FAILURES : 1);
	for (i = 0; i < NR_POSTCOPY_FAILURES; i++) {
		if (only < 0 || only == i)
			test_migration(i, json);
	}
	ksft_finished();
}
