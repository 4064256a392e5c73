// SPDX-License-Identifier: GPL-2.0-only
/*
 * Race test of KVM Userfault, with an oracle.
 *
 * vCPUs read and write random pages while other threads arm, fill and clear
 * pages, switch KVM Userfault off and on, toggle dirty logging, and delete,
 * re-create and move memslots.  The oracle:
 *
 * - A page that is not filled holds poison, or zeroes, and no vCPU ever reads
 *   either.  What a vCPU does read carries the page's index, so that a wrong
 *   page is noticed too.
 * - Each fill gives the page a new generation.  For any vCPU the generation of
 *   a page never goes back.
 * - Each vCPU has a word of its own in each page, and every value written there
 *   survives whatever happens to the page.
 * - Each userfault exit names the page and the kind of the access that the
 *   vCPU is in the middle of.
 * - No vCPU stops at a page that was cleared before it ran, and not armed since.
 * - No access is MMIO unless the memslot was away meanwhile.
 * - Each thread makes progress.
 *
 * Before the free-for-all the test checks that no update is lost if neighbouring
 * bits of the bitmap change at once: a vCPU must stop at each page that is armed
 * and must not stop at one that was cleared.
 */
#include <linux/bitmap.h>
#include <linux/sizes.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include <asm/barrier.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"

#define FIRST_SLOT		1
#define NR_SLOTS		2
#define BLOCKS_PER_SLOT		2
#define MAX_VCPUS		16
/* With more of them, hardly any two threads would ever meet at one page. */
#define MAX_PAGES		SZ_64K

#ifdef __x86_64__
#define KVM_EMULATES_ACCESSES	true
#else
#define KVM_EMULATES_ACCESSES	false
#endif

/* A thread that stands still for so long hangs, however slow the machine is. */
#define STALL_SECONDS		30

/* How long a mood lasts. */
#define MOOD_MSECS		300

/* The words of a page that the oracle looks at, one at the start of each part. */
#define NR_WORDS		16
#define POISON			0xdead000000000000ull
/* What a vCPU reads where there is no memslot. */
#define NO_SLOT			(~0ull)

/* For the first phase of a vCPU, in place of the page to look at: all, the end. */
#define CMD_SWEEP		(~1ull)
#define CMD_END			(~0ull)

struct guest_vcpu {
	u64 progress;
	u64 seed;
	u64 cmd_page;

	/* The access that is going on. */
	u64 page;
	u64 writing;

	/* The last value of the vCPU's own word, and the generation, by page. */
	u64 *own;
	u64 *gens;
	u64 nr_writes;
	u64 nr_no_slot;
};

struct guest_shared {
	u64 nr_pages;
	u64 page_size;
	u64 stop;
	/* So many accesses go to so many pages, at random, from this one on. */
	u64 hot_percent;
	u64 hot_window;
	u64 hot_page;
	struct guest_vcpu vcpus[MAX_VCPUS];
};

/*
 * A single plain load or store each, as KVM can neither emulate a fancier one
 * when the memslot is away (arm64) nor promise to do it at once (x86).
 */
static u64 guest_load(u64 gva)
{
	u64 val;

#ifdef __aarch64__
	asm volatile("ldr %0, [%1]" : "=r" (val) : "r" (gva) : "memory");
#else
	asm volatile("mov (%1), %0" : "=r" (val) : "r" (gva) : "memory");
#endif
	return val;
}

static void guest_store(u64 gva, u64 val)
{
#ifdef __aarch64__
	asm volatile("str %0, [%1]" : : "r" (val), "r" (gva) : "memory");
#else
	asm volatile("mov %0, (%1)" : : "r" (val), "r" (gva) : "memory");
#endif
}

static u64 word_offset(u64 page_size, int word)
{
	return word * (page_size / NR_WORDS);
}

static u64 own_word_offset(u64 page_size, int vcpu_idx)
{
	return word_offset(page_size, vcpu_idx) + sizeof(u64);
}

static u64 word_value(u64 gen, u64 page, int word)
{
	return gen << 32 | page << 8 | word;
}

static u64 word_gen(u64 val)
{
	return val >> 32;
}

static u64 guest_page_gva(struct guest_shared *s, u64 page)
{
	/* The memory is identity mapped. */
	return AGENT_GPA + page * s->page_size;
}

static void guest_check_word(struct guest_vcpu *v, u64 page, int word, u64 val)
{
	u64 gen = word_gen(val);

	if (val == NO_SLOT) {
		WRITE_ONCE(v->nr_no_slot, v->nr_no_slot + 1);
		return;
	}

	__GUEST_ASSERT(gen && val == word_value(gen, page, word) && !(val >> 63),
		       "page 0x%lx word %d: read 0x%lx, which is no filled page",
		       page, word, val);
	__GUEST_ASSERT(gen >= v->gens[page],
		       "page 0x%lx word %d: generation went from 0x%lx to 0x%lx",
		       page, word, v->gens[page], gen);
	v->gens[page] = gen;
}

static void guest_check_page(struct guest_shared *s, struct guest_vcpu *v, u64 page)
{
	int i;

	WRITE_ONCE(v->page, page);
	WRITE_ONCE(v->writing, false);

	for (i = 0; i < NR_WORDS; i++) {
		u64 off = word_offset(s->page_size, i);

		guest_check_word(v, page, i, guest_load(guest_page_gva(s, page) + off));
		/* Generations are compared in the order of the loads. */
		smp_rmb();
	}
}

static void guest_check_own_word(struct guest_shared *s, int vcpu_idx, u64 page)
{
	u64 gva = guest_page_gva(s, page) + own_word_offset(s->page_size, vcpu_idx);
	struct guest_vcpu *v = &s->vcpus[vcpu_idx];
	u64 val;

	WRITE_ONCE(v->page, page);
	WRITE_ONCE(v->writing, false);

	val = guest_load(gva);
	__GUEST_ASSERT(val == v->own[page], "page 0x%lx: wrote 0x%lx, read 0x%lx",
		       page, v->own[page], val);
}

static void guest_write_own_word(struct guest_shared *s, int vcpu_idx, u64 page)
{
	u64 gva = guest_page_gva(s, page) + own_word_offset(s->page_size, vcpu_idx);
	struct guest_vcpu *v = &s->vcpus[vcpu_idx];

	WRITE_ONCE(v->page, page);
	WRITE_ONCE(v->writing, true);

	v->own[page] = ++v->nr_writes;
	guest_store(gva, v->own[page]);
}

static void guest_sweep(struct guest_shared *s, struct guest_vcpu *v)
{
	u64 page;

	for (page = 0; page < s->nr_pages; page++)
		guest_check_page(s, v, page);
}

/* Phase 1: look at one page at a time, or at all, as the host asks for. */
static void guest_obey(struct guest_shared *s, struct guest_vcpu *v)
{
	u64 cmd;

	while ((cmd = READ_ONCE(v->cmd_page)) != CMD_END) {
		if (cmd == CMD_SWEEP)
			guest_sweep(s, v);
		else
			guest_check_page(s, v, cmd);
		GUEST_SYNC(cmd);
	}
}

static u64 guest_pick_page(struct guest_shared *s, struct kvm_random_state *rng)
{
	u64 page = kvm_random_u32(rng);

	if (__kvm_random_bool(rng, READ_ONCE(s->hot_percent)))
		page = READ_ONCE(s->hot_page) + page % READ_ONCE(s->hot_window);

	return page % s->nr_pages;
}

/* Phase 2: do to the memory whatever comes to mind. */
static void guest_roam(struct guest_shared *s, int vcpu_idx)
{
	struct guest_vcpu *v = &s->vcpus[vcpu_idx];
	struct kvm_random_state rng = new_kvm_random_state(v->seed);

	while (!READ_ONCE(s->stop)) {
		u64 page = guest_pick_page(s, &rng);

		switch (kvm_random_u32(&rng) % 4) {
		case 0:
			guest_write_own_word(s, vcpu_idx, page);
			break;
		case 1:
			guest_check_own_word(s, vcpu_idx, page);
			break;
		default:
			guest_check_page(s, v, page);
			break;
		}
		WRITE_ONCE(v->progress, v->progress + 1);
	}
}

static void guest_code(struct guest_shared *s, int vcpu_idx)
{
	struct guest_vcpu *v = &s->vcpus[vcpu_idx];
	u64 page;

	guest_obey(s, v);
	guest_roam(s, vcpu_idx);

	for (page = 0; page < s->nr_pages; page++) {
		guest_check_page(s, v, page);
		guest_check_own_word(s, vcpu_idx, page);
		WRITE_ONCE(v->progress, v->progress + 1);
	}

	GUEST_DONE();
}

struct worker {
	const char *name;
	pthread_t thread;
	void (*op)(struct worker *w);
	struct kvm_random_state rng;
	int idx;
	bool done;

	/* For the watchdog: what must change, and since when it did not. */
	u64 loops;
	u64 *progress;
	u64 last_progress;
	struct timespec since;
	const char *doing;

	/* vCPU threads only. */
	struct kvm_vcpu *vcpu;
	struct guest_vcpu *guest;
	/* The page that another thread is to resolve, plus 1. */
	u64 wanted;
	/* The page that was clear when the vCPU last stopped there, plus 1. */
	u64 clear_page;
	u64 clear_nr_arms;
	/* Of each memslot before the vCPU ran, see below. */
	u32 slot_seqs[NR_SLOTS];
	u64 nr_userfaults;
	u64 nr_mmio;
	u64 nr_no_slot;
};

struct page_state {
	pthread_mutex_t lock;
	bool armed;
	u32 gen;
	u64 nr_arms;
};

static struct kvm_vm *vm;
static struct guest_shared *shared;
static struct page_state *pages;
static void *slot_hva[NR_SLOTS];
/* Changes whenever the memslot comes or goes, and is odd while it is away. */
static u32 slot_seqs[NR_SLOTS];
static enum vm_mem_backing_src_type backing_src;
static u64 page_size, nr_pages, pages_per_slot, pages_per_block, pages_per_backing;
static int nr_vcpus = 3;
static bool has_pre_fault;
/* Whether memory loses all its mappings when any memslot goes away. */
static bool slot_zaps_all;

static struct worker vcpu_workers[MAX_VCPUS];
static struct worker mutators[8];
static int nr_mutators;
static bool stop_workers;

/* What the mutators of phase 2 are up to, all of them, and by turns. */
enum mood {
	/* Everything at once, everywhere. */
	HASTE,
	/*
	 * Leave the vCPUs alone for so long that they run for a while with a
	 * warm TLB and huge mappings, which arming has to take away.
	 */
	CALM,
	/* Arm and resolve the very pages that all vCPUs fault on just then. */
	FOCUS,
	NR_MOODS,
};

static enum mood mood;

/* Held for writing while KVM Userfault is switched off and on. */
static pthread_rwlock_t enabled_lock;
/* Held for reading in KVM_RUN. */
static pthread_rwlock_t run_lock;
static bool pause_vcpus;
/* Held for reading in KVM_PRE_FAULT_MEMORY, see slot_update(). */
static pthread_rwlock_t pre_fault_lock;

/* What there is to do in phase 2.  Without any of it there would be no race. */
enum deed {
	DEED_ARM,
	DEED_DROP,
	DEED_RESOLVE,
	DEED_RESOLVE_FOR_VCPU,
	DEED_TOGGLE,
	DEED_DELETE_SLOT,
	DEED_MOVE_SLOT,
	DEED_TOGGLE_LOG,
	DEED_GET_LOG,
	NR_DEEDS,
};

static const char * const deed_names[] = {
	[DEED_ARM]		= "pages armed",
	[DEED_DROP]		= "pages dropped",
	[DEED_RESOLVE]		= "pages resolved",
	[DEED_RESOLVE_FOR_VCPU]	= "pages resolved for a vCPU that waits",
	[DEED_TOGGLE]		= "times off and on",
	[DEED_DELETE_SLOT]	= "memslots deleted",
	[DEED_MOVE_SLOT]	= "memslots moved",
	[DEED_TOGGLE_LOG]	= "times dirty logging switched",
	[DEED_GET_LOG]		= "dirty logs read",
};

static u64 deeds[NR_DEEDS];
static u64 nr_samples, nr_huge_samples;

static void *page_hva(u64 page)
{
	return slot_hva[page / pages_per_slot] + page % pages_per_slot * page_size;
}

static u64 *page_word(u64 page, int word)
{
	return page_hva(page) + word_offset(page_size, word);
}

static u64 *page_own_word(u64 page, int vcpu_idx)
{
	return page_hva(page) + own_word_offset(page_size, vcpu_idx);
}

static struct kvm_random_state new_rng(u32 nr)
{
	/* The generator never leaves zero. */
	return new_kvm_random_state((kvm_random_seed + nr * 0x9e3779b1u) % 0x7ffffffe + 1);
}

static void count_deeds(enum deed deed, u64 nr)
{
	__sync_fetch_and_add(&deeds[deed], nr);
}

static u64 random_below(struct worker *w, u64 limit)
{
	return kvm_random_u32(&w->rng) % limit;
}

/* In ascending order, always: ranges of several threads overlap. */
static void lock_pages(u64 first, u64 nr)
{
	u64 i;

	for (i = first; i < first + nr; i++)
		pthread_mutex_lock(&pages[i].lock);
}

static void unlock_pages(u64 first, u64 nr)
{
	u64 i;

	for (i = first; i < first + nr; i++)
		pthread_mutex_unlock(&pages[i].lock);
}

/* Keep pages as they are, and KVM Userfault enabled. */
static void lock_range(struct worker *w, u64 first, u64 nr, const char *waiting)
{
	w->doing = waiting;
	pthread_rwlock_rdlock(&enabled_lock);
	lock_pages(first, nr);
}

static void unlock_range(u64 first, u64 nr)
{
	unlock_pages(first, nr);
	pthread_rwlock_unlock(&enabled_lock);
}

static void fill_page(u64 page)
{
	u32 gen = ++pages[page].gen;
	int i;

	for (i = 0; i < NR_WORDS; i++)
		WRITE_ONCE(*page_word(page, i), word_value(gen, page, i));
}

static void poison_pages(u64 first, u64 nr)
{
	u64 page;
	int i;

	for (page = first; page < first + nr; page++)
		for (i = 0; i < NR_WORDS; i++)
			WRITE_ONCE(*page_word(page, i), POISON | word_value(0, page, i));
}

/* Give the host pages back, so that KVM's MMU notifiers race with the rest. */
static void drop_block(u64 first, u64 nr)
{
	int advice = backing_src_is_shared(backing_src) ? MADV_REMOVE : MADV_DONTNEED;
	u64 *own, page;
	int i, r;

	own = calloc(nr * nr_vcpus, sizeof(*own));
	TEST_ASSERT(own, "Failed to allocate the words to keep");

	for (page = 0; page < nr; page++)
		for (i = 0; i < nr_vcpus; i++)
			own[page * nr_vcpus + i] = *page_own_word(first + page, i);

	r = madvise(page_hva(first), nr * page_size, advice);
	TEST_ASSERT(!r, "madvise(%d) failed, errno %d", advice, errno);

	for (page = 0; page < nr; page++)
		for (i = 0; i < nr_vcpus; i++)
			*page_own_word(first + page, i) = own[page * nr_vcpus + i];

	free(own);
	count_deeds(DEED_DROP, nr);
}

static bool can_drop(u64 first, u64 nr)
{
	return !(first % pages_per_backing) && !(nr % pages_per_backing) &&
	       first / pages_per_slot == (first + nr - 1) / pages_per_slot;
}

static void arm_pages(struct worker *w, u64 first, u64 nr)
{
	u64 page;

	lock_range(w, first, nr, "waiting to arm");

	w->doing = "arming";
	vm_userfault_arm(vm, page_gpa(first), nr * page_size);
	for (page = first; page < first + nr; page++) {
		pages[page].armed = true;
		pages[page].nr_arms++;
	}

	w->doing = "emptying pages";
	/* Ranges that are made of huge pages are rare enough. */
	if (can_drop(first, nr) && (pages_per_backing > 1 || !random_below(w, 4)))
		drop_block(first, nr);
	else
		poison_pages(first, nr);
	count_deeds(DEED_ARM, nr);

	unlock_range(first, nr);
}

/* Fill and clear those pages from @first on that are armed, return their number. */
static u64 resolve_armed(struct worker *w, u64 first, u64 end)
{
	u64 page;

	w->doing = "filling";
	for (page = first; page < end && pages[page].armed; page++) {
		fill_page(page);
		pages[page].armed = false;
	}

	w->doing = "clearing";
	if (page > first)
		vm_userfault_clear(vm, page_gpa(first), (page - first) * page_size);

	return page - first;
}

/*
 * Clear just what is armed: to clear a page twice might hide that it was not clear
 * after the first time.  Returns the number of pages.
 */
static u64 resolve_pages(struct worker *w, u64 first, u64 nr)
{
	u64 page, nr_done, sum = 0;

	lock_range(w, first, nr, "waiting to resolve");

	for (page = first; page < first + nr; page += nr_done + 1) {
		nr_done = resolve_armed(w, page, first + nr);
		sum += nr_done;
	}

	unlock_range(first, nr);

	count_deeds(DEED_RESOLVE, sum);
	return sum;
}

static void check_userfault_exit(struct worker *w)
{
	struct kvm_run *run = w->vcpu->run;
	u64 flags = KVM_MEMORY_EXIT_FLAG_USERFAULT;

	flags |= w->guest->writing ? KVM_MEMORY_EXIT_FLAG_WRITE : KVM_MEMORY_EXIT_FLAG_READ;

	TEST_ASSERT(run->memory_fault.gpa == page_gpa(w->guest->page),
		    "Userfault exit for gpa 0x%llx, but the guest accesses 0x%lx",
		    run->memory_fault.gpa, page_gpa(w->guest->page));
	TEST_ASSERT_EQ(run->memory_fault.flags, flags);
	TEST_ASSERT_EQ(run->memory_fault.size, page_size);
}

static void print_page_state(u64 page)
{
	int i;

	if (page >= nr_pages)
		return;

	fprintf(stderr, "page 0x%lx, gpa 0x%lx: %s, generation 0x%x, words",
		page, page_gpa(page), pages[page].armed ? "armed" : "clear", pages[page].gen);
	for (i = 0; i < NR_WORDS; i++)
		fprintf(stderr, " 0x%lx", *page_word(page, i));
	fputs("\n", stderr);
}

static void print_access(struct worker *w)
{
	fprintf(stderr, "%s: in %s of ", w->name, w->guest->writing ? "write" : "read");
	print_page_state(w->guest->page);
}

static void report_guest_failure(struct worker *w, struct ucall *uc)
{
	print_access(w);
	REPORT_GUEST_ASSERT(*uc);
}

static void fail_run(struct worker *w, int r, const char *expected)
{
	int saved_errno = errno;

	print_access(w);
	errno = saved_errno;
	vcpu_fail_run(w->vcpu, r, expected);
}

/*
 * Phase 1.  In the first two words of the bitmap, each vCPU owns some bits and
 * two more threads own the rest.  All of them set and clear their own without
 * any locking.
 */
#define BITS_PAGES	128
#define BITS_ROUNDS	10

static bool is_vcpu_bit(u64 page)
{
	return page < 32 || page >= 96;
}

static void bits_run_to_userfault(struct worker *w)
{
	struct ucall uc;
	int r;

	w->doing = "running the vCPU to the armed page";
	r = _vcpu_run(w->vcpu);
	if (!r && get_ucall(w->vcpu, &uc) == UCALL_ABORT)
		report_guest_failure(w, &uc);

	if (!vcpu_has_userfault(w->vcpu, r))
		fail_run(w, r, "a userfault exit for an armed page");
	check_userfault_exit(w);
	w->nr_userfaults++;
}

static void bits_run_to_sync(struct worker *w, u64 guest_cmd)
{
	struct ucall uc;
	u64 cmd;
	int r;

	w->doing = "running the vCPU past what is clear";
	r = _vcpu_run(w->vcpu);
	if (r)
		fail_run(w, r, "no exit for a page that is clear");

	cmd = get_ucall(w->vcpu, &uc);
	if (cmd == UCALL_ABORT)
		report_guest_failure(w, &uc);
	if (cmd != UCALL_SYNC || uc.args[1] != guest_cmd)
		fail_run(w, r, "the guest's report");
}

static void bits_vcpu(struct worker *w)
{
	u64 page;

	do {
		page = random_below(w, BITS_PAGES / nr_vcpus) * nr_vcpus + w->idx;
	} while (!is_vcpu_bit(page));

	WRITE_ONCE(w->guest->cmd_page, page);
	arm_pages(w, page, 1);
	bits_run_to_userfault(w);
	resolve_pages(w, page, 1);
	bits_run_to_sync(w, page);
}

/* Clear page by page: only arming takes a lock that keeps others out. */
static void bits_hammer(struct worker *w)
{
	u64 first = 32 + 32 * w->idx + random_below(w, 16);
	u64 nr = 1 + random_below(w, 16);
	u64 page;

	w->doing = "arming bits";
	vm_userfault_arm(vm, page_gpa(first), nr * page_size);

	w->doing = "clearing bits";
	for (page = first; page < first + nr; page++)
		vm_userfault_clear(vm, page_gpa(page), page_size);
}

/* All are clear: a vCPU must get past every page.  Returns how many exits it took. */
static u64 bits_sweep(struct worker *w)
{
	u64 before = vcpu_get_stat(w->vcpu, exits);

	WRITE_ONCE(w->guest->cmd_page, CMD_SWEEP);
	bits_run_to_sync(w, CMD_SWEEP);

	return vcpu_get_stat(w->vcpu, exits) - before;
}

/* Phase 2. */

static __thread struct kvm_run *this_run;

static void kick_handler(int sig)
{
	if (this_run)
		WRITE_ONCE(this_run->immediate_exit, 1);
}

static void kick_vcpus(void)
{
	int i;

	for (i = 0; i < nr_vcpus; i++)
		pthread_kill(vcpu_workers[i].thread, SIGUSR1);
}

/*
 * Take all vCPUs out of KVM_RUN.  Kick them until it works: a vCPU thread that
 * is about to enter KVM_RUN forgets about the kicks so far.
 */
static void vcpus_pause(struct worker *w)
{
	w->doing = "pausing vCPUs";
	WRITE_ONCE(pause_vcpus, true);
	while (pthread_rwlock_trywrlock(&run_lock)) {
		kick_vcpus();
		usleep(50);
	}
}

static void vcpus_resume(void)
{
	pthread_rwlock_unlock(&run_lock);
	WRITE_ONCE(pause_vcpus, false);
}

static int run_vcpu(struct worker *w)
{
	int r, saved_errno, i;

	w->doing = "paused";
	while (READ_ONCE(pause_vcpus))
		sched_yield();

	pthread_rwlock_rdlock(&run_lock);
	w->doing = "in KVM_RUN";
	for (i = 0; i < NR_SLOTS; i++)
		w->slot_seqs[i] = READ_ONCE(slot_seqs[i]);
	WRITE_ONCE(w->vcpu->run->immediate_exit, 0);
	r = __vcpu_run(w->vcpu);
	saved_errno = errno;
	w->doing = "after KVM_RUN";
	pthread_rwlock_unlock(&run_lock);

	errno = saved_errno;
	return r;
}

/* The range of pages that a pager might fill on the occasion of one fault. */
static void pick_cluster(struct worker *w, u64 page, u64 *first, u64 *nr)
{
	*first = page;
	*nr = 1;

	switch (random_below(w, 32)) {
	case 0:
		*first = page / pages_per_block * pages_per_block;
		*nr = pages_per_block;
		break;
	case 1 ... 8:
		*first = page / 64 * 64;
		*nr = 64;
		break;
	case 9 ... 16:
		*nr = 1 + random_below(w, min_t(u64, 8, nr_pages - page));
		break;
	}
}

/* Not at the page that the vCPU stopped at, where it would come to an end at once. */
static void pre_fault(struct worker *w)
{
	u64 page = random_below(w, nr_pages);
	u64 nr = 1 + random_below(w, min_t(u64, 64, nr_pages - page));
	struct kvm_pre_fault_memory range = {
		.gpa = page_gpa(page),
		.size = nr * page_size,
	};
	int r;

	w->doing = "waiting to pre-fault";
	pthread_rwlock_rdlock(&pre_fault_lock);
	w->doing = "pre-faulting";
	r = __vcpu_ioctl(w->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	pthread_rwlock_unlock(&pre_fault_lock);

	TEST_ASSERT(!r || errno == EFAULT || errno == EAGAIN || errno == EINTR ||
		    errno == ENOENT || errno == EOPNOTSUPP,
		    "KVM_PRE_FAULT_MEMORY failed, errno %d (%s)", errno, strerror(errno));
}

/*
 * A vCPU that stopped at a page which somebody has cleared by now may have come
 * too early.  It must not stop there again unless the page is armed again.  Look
 * only if that takes no waiting, so that vCPUs race with whoever arms and clears.
 */
static void check_lost_clear(struct worker *w, u64 page)
{
	struct page_state *state = &pages[page];
	bool armed = true;
	u64 nr_arms = 0;

	if (!pthread_rwlock_tryrdlock(&enabled_lock)) {
		if (!pthread_mutex_trylock(&state->lock)) {
			armed = state->armed;
			nr_arms = state->nr_arms;
			pthread_mutex_unlock(&state->lock);
		}
		pthread_rwlock_unlock(&enabled_lock);
	}

	TEST_ASSERT(armed || w->clear_page != page + 1 || w->clear_nr_arms != nr_arms,
		    "%s stopped twice at page 0x%lx, which is clear", w->name, page);

	w->clear_page = armed ? 0 : page + 1;
	w->clear_nr_arms = nr_arms;
}

static void handle_userfault(struct worker *w)
{
	u64 page = w->guest->page;
	u64 first, nr;

	check_userfault_exit(w);
	check_lost_clear(w, page);
	w->nr_userfaults++;

	if (has_pre_fault && !random_below(w, 8))
		pre_fault(w);

	/* Have another thread resolve it every now and then, and try meanwhile. */
	if (kvm_random_bool(&w->rng)) {
		WRITE_ONCE(w->wanted, page + 1);
		sched_yield();
		return;
	}

	pick_cluster(w, page, &first, &nr);
	resolve_pages(w, first, nr);
}

/*
 * The memslot is away.  Nobody knows the content of the page, but the vCPU's
 * own word is accessible, so that the guest need not know about memslots.
 */
static void handle_mmio(struct worker *w)
{
	u64 slot = w->guest->page / pages_per_slot;
	struct kvm_run *run = w->vcpu->run;
	u64 *own = page_own_word(w->guest->page, w->idx);
	u64 no_slot = NO_SLOT;
	bool is_own;

	is_own = run->mmio.phys_addr == page_gpa(w->guest->page) +
					own_word_offset(page_size, w->idx);
	TEST_ASSERT((w->slot_seqs[slot] & 1) || w->slot_seqs[slot] != READ_ONCE(slot_seqs[slot]),
		    "MMIO at 0x%llx, where there was a memslot all the time",
		    run->mmio.phys_addr);
	TEST_ASSERT_EQ(run->mmio.len, sizeof(u64));
	TEST_ASSERT_EQ(run->mmio.is_write, w->guest->writing);
	TEST_ASSERT(is_own || !run->mmio.is_write, "MMIO write to 0x%llx",
		    run->mmio.phys_addr);

	lock_pages(w->guest->page, 1);
	if (run->mmio.is_write)
		memcpy(own, run->mmio.data, sizeof(u64));
	else
		memcpy(run->mmio.data, is_own ? own : &no_slot, sizeof(u64));
	unlock_pages(w->guest->page, 1);

	w->nr_mmio++;
	if (!run->mmio.is_write && !is_own)
		w->nr_no_slot++;
}

static bool is_test_mmio(struct worker *w)
{
	struct kvm_run *run = w->vcpu->run;

	return run->exit_reason == KVM_EXIT_MMIO &&
	       run->mmio.phys_addr >= AGENT_GPA &&
	       run->mmio.phys_addr < page_gpa(nr_pages);
}

static void handle_ucall(struct worker *w)
{
	struct ucall uc;

	switch (get_ucall(w->vcpu, &uc)) {
	case UCALL_DONE:
		w->done = true;
		break;
	case UCALL_ABORT:
		report_guest_failure(w, &uc);
		break;
	default:
		fail_run(w, 0, "an exit that the guest has reason for");
	}
}

static void race_vcpu(struct worker *w)
{
	int r = run_vcpu(w);

	if (r == -1 && errno == EINTR)
		return;

	if (r == -1) {
		if (!vcpu_has_userfault(w->vcpu, r))
			fail_run(w, r, "a userfault exit");
		handle_userfault(w);
	} else if (is_test_mmio(w)) {
		handle_mmio(w);
	} else {
		handle_ucall(w);
	}
}

static void pick_range(struct worker *w, u64 *first, u64 *nr)
{
	u64 max = 1ull << random_below(w, 8);

	*first = random_below(w, nr_pages);
	if (kvm_random_bool(&w->rng))
		*first = (shared->hot_page + *first % 64) % nr_pages;

	switch (random_below(w, 64)) {
	case 0:
		*first = *first / pages_per_block * pages_per_block;
		*nr = pages_per_block;
		break;
	case 1:
		*nr = 1 + random_below(w, nr_pages - *first);
		break;
	default:
		*nr = 1 + random_below(w, min_t(u64, max, nr_pages - *first));
		break;
	}
}

static void focus_armer(struct worker *w)
{
	u64 first = (shared->hot_page + random_below(w, shared->hot_window)) % nr_pages;
	u64 nr = 1 + random_below(w, min_t(u64, 2, nr_pages - first));

	arm_pages(w, first, nr);
	resolve_pages(w, first, nr);
}

static void race_armer(struct worker *w)
{
	enum mood m = READ_ONCE(mood);
	u64 first, nr;

	if (!random_below(w, 64))
		WRITE_ONCE(shared->hot_page, random_below(w, nr_pages));

	if (m == FOCUS) {
		focus_armer(w);
		return;
	}

	pick_range(w, &first, &nr);
	arm_pages(w, first, nr);

	w->doing = "sleeping";
	if (m == CALM)
		usleep(random_below(w, 10000));
	else if (!random_below(w, 4))
		usleep(random_below(w, 1000));
}

static void race_filler(struct worker *w)
{
	u64 first, nr, wanted;
	int i;

	for (i = 0; i < nr_vcpus; i++) {
		wanted = READ_ONCE(vcpu_workers[i].wanted);
		if (!wanted)
			continue;

		WRITE_ONCE(vcpu_workers[i].wanted, 0);
		count_deeds(DEED_RESOLVE_FOR_VCPU, resolve_pages(w, wanted - 1, 1));
	}

	if (!random_below(w, 8)) {
		pick_range(w, &first, &nr);
		resolve_pages(w, first, nr);
	}

	w->doing = "sleeping";
	if (READ_ONCE(mood) == CALM)
		usleep(1000);
	else
		sched_yield();
}

/* All must be filled before KVM Userfault goes away, as must be the bits then. */
static void race_toggler(struct worker *w)
{
	u64 page;

	w->doing = "sleeping";
	usleep(random_below(w, 200000));

	w->doing = "waiting to disable";
	pthread_rwlock_wrlock(&enabled_lock);

	for (page = 0; page < nr_pages; page++) {
		if (pages[page].armed)
			fill_page(page);
		pages[page].armed = false;
	}

	w->doing = "disabling";
	vm_userfault_disable(vm);
	usleep(random_below(w, 3000));
	w->doing = "enabling";
	vm_userfault_enable(vm);
	count_deeds(DEED_TOGGLE, 1);

	pthread_rwlock_unlock(&enabled_lock);
}

/*
 * To delete or move a memslot, KVM may drop all page tables, not only those of the
 * memslot.  KVM_PRE_FAULT_MEMORY must not be going on then: it would retry until
 * its page tables are not those that were dropped, but never replaces them, and
 * until it gives up, which takes a signal, KVM waits for it with the memslot.
 */
static void slot_update(struct kvm_userspace_memory_region2 *region)
{
	if (slot_zaps_all)
		pthread_rwlock_wrlock(&pre_fault_lock);

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION2, region);

	if (slot_zaps_all)
		pthread_rwlock_unlock(&pre_fault_lock);
}

/*
 * Put a memslot back where vCPUs may be in the middle of an access.  Where KVM
 * emulates accesses, have no vCPU in KVM_RUN meanwhile: a vCPU that found no
 * memslot ends up in the emulator, and if the memslot appears before the
 * emulator gets to the access, then it is KVM itself that accesses the page,
 * which is not intercepted without KVM_USERFAULT_ASYNC.
 */
static void slot_insert(struct worker *w, struct kvm_userspace_memory_region2 *region)
{
	if (KVM_EMULATES_ACCESSES)
		vcpus_pause(w);

	w->doing = "inserting a memslot";
	slot_update(region);
	__sync_fetch_and_add(&slot_seqs[region->slot - FIRST_SLOT], 1);

	if (KVM_EMULATES_ACCESSES)
		vcpus_resume();
}

/* Those of a guest_memfd can be deleted, and nothing else. */
static bool slots_can_change(void)
{
	return backing_src != VM_MEM_SRC_GUEST_MEMFD;
}

static void slot_remove(struct worker *w, const struct kvm_userspace_memory_region2 *region)
{
	struct kvm_userspace_memory_region2 tmp = *region;

	__sync_fetch_and_add(&slot_seqs[region->slot - FIRST_SLOT], 1);
	if (slots_can_change() && kvm_random_bool(&w->rng)) {
		w->doing = "moving a memslot";
		tmp.guest_phys_addr += 2 * nr_pages * page_size;
		count_deeds(DEED_MOVE_SLOT, 1);
	} else {
		w->doing = "deleting a memslot";
		tmp.memory_size = 0;
		count_deeds(DEED_DELETE_SLOT, 1);
	}
	slot_update(&tmp);
}

static void slot_get_dirty_log(struct worker *w, u32 slot)
{
	unsigned long *bitmap = bitmap_zalloc(pages_per_slot);

	TEST_ASSERT(bitmap, "Failed to allocate the dirty bitmap");

	w->doing = "getting the dirty log";
	kvm_vm_get_dirty_log(vm, slot, bitmap);
	count_deeds(DEED_GET_LOG, 1);
	free(bitmap);
}

static void race_slots(struct worker *w)
{
	u32 slot = FIRST_SLOT + random_below(w, NR_SLOTS);
	struct userspace_mem_region *region = memslot2region(vm, slot);

	if (READ_ONCE(mood) != HASTE) {
		w->doing = "sleeping";
		usleep(10000);
		return;
	}

	switch (slots_can_change() ? random_below(w, 4) : 0) {
	case 0:
		slot_remove(w, &region->region);
		usleep(random_below(w, 1000));
		slot_insert(w, &region->region);
		break;
	case 1:
		if (region->region.flags & KVM_MEM_LOG_DIRTY_PAGES)
			slot_get_dirty_log(w, slot);
		break;
	default:
		w->doing = "toggling dirty logging";
		vm_mem_region_set_flags(vm, slot,
					region->region.flags ^ KVM_MEM_LOG_DIRTY_PAGES);
		count_deeds(DEED_TOGGLE_LOG, 1);
		break;
	}

	w->doing = "sleeping";
	usleep(random_below(w, 20000));
}

static void *mutator_main(void *data)
{
	struct worker *w = data;

	do {
		w->op(w);
		WRITE_ONCE(w->loops, w->loops + 1);
	} while (!READ_ONCE(stop_workers));

	w->doing = "done";
	w->done = true;
	return NULL;
}

static void *race_vcpu_main(void *data)
{
	struct worker *w = data;

	this_run = w->vcpu->run;
	while (!w->done)
		w->op(w);

	w->doing = "done";
	return NULL;
}

static void print_worker(struct worker *w)
{
	fprintf(stderr, "%s: progress %lu, %s", w->name, READ_ONCE(*w->progress), w->doing);
	if (!w->vcpu) {
		fputs("\n", stderr);
		return;
	}

	fprintf(stderr, ", last exit %s, %lu userfaults, %lu MMIO, %s of ",
		exit_reason_str(w->vcpu->run->exit_reason), w->nr_userfaults, w->nr_mmio,
		w->guest->writing ? "write" : "read");
	print_page_state(w->guest->page);
}

static void fail_stalled(struct worker *w)
{
	int i;

	for (i = 0; i < nr_vcpus; i++)
		print_worker(&vcpu_workers[i]);
	for (i = 0; i < nr_mutators; i++)
		print_worker(&mutators[i]);

	TEST_FAIL("%s made no progress in %d seconds", w->name, STALL_SECONDS);
}

static void watch_worker(struct worker *w)
{
	u64 progress = READ_ONCE(*w->progress);

	if (READ_ONCE(w->done) || !w->thread || progress != w->last_progress) {
		w->last_progress = progress;
		clock_gettime(CLOCK_MONOTONIC, &w->since);
	} else if (timespec_elapsed(w->since).tv_sec >= STALL_SECONDS) {
		fail_stalled(w);
	}
}

static void watch_workers(void)
{
	int i;

	for (i = 0; i < nr_vcpus; i++)
		watch_worker(&vcpu_workers[i]);
	for (i = 0; i < nr_mutators; i++)
		watch_worker(&mutators[i]);
}

static void set_mood(enum mood m)
{
	WRITE_ONCE(shared->hot_window, m == FOCUS ? 4 : 64);
	WRITE_ONCE(shared->hot_percent, m == FOCUS ? 95 : 50);
	WRITE_ONCE(mood, m);
}

/* Whether the memory is mapped huge is not for KVM on arm64 to tell. */
static void sample_huge_mappings(void)
{
#ifdef __x86_64__
	nr_samples++;
	if (vm_get_stat(vm, pages_2m))
		nr_huge_samples++;
#endif
}

static void watch_for(u64 msecs)
{
	struct timespec start;
	u64 elapsed;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		watch_workers();
		usleep(20000);
		sample_huge_mappings();
		elapsed = timespec_to_ns(timespec_elapsed(start)) / 1000000;
		set_mood(elapsed / MOOD_MSECS % NR_MOODS);
	} while (elapsed < msecs);
}

static void start_worker(struct worker *w, void *(*fn)(void *))
{
	w->done = false;
	w->doing = "starting";
	clock_gettime(CLOCK_MONOTONIC, &w->since);
	kvm_pthread_create(&w->thread, NULL, fn, w);
}

static void join_worker(struct worker *w)
{
	while (pthread_tryjoin_np(w->thread, NULL)) {
		watch_workers();
		usleep(1000);
	}
	w->thread = 0;
}

static void start_mutator(const char *name, int idx, void (*op)(struct worker *w))
{
	struct worker *w = &mutators[nr_mutators];

	TEST_ASSERT(nr_mutators < ARRAY_SIZE(mutators), "Too many mutators");
	*w = (struct worker) {
		.name = name,
		.idx = idx,
		.op = op,
		.rng = new_rng(MAX_VCPUS + nr_mutators),
		.progress = &w->loops,
	};
	nr_mutators++;

	start_worker(w, mutator_main);
}

static void stop_mutators(void)
{
	int i;

	WRITE_ONCE(stop_workers, true);
	for (i = 0; i < nr_mutators; i++)
		join_worker(&mutators[i]);
	nr_mutators = 0;
}

static void run_bits_round(u64 msecs)
{
	int i;

	WRITE_ONCE(stop_workers, false);
	for (i = 0; i < nr_vcpus; i++) {
		vcpu_workers[i].op = bits_vcpu;
		vcpu_workers[i].progress = &vcpu_workers[i].loops;
		start_worker(&vcpu_workers[i], mutator_main);
	}
	start_mutator("bit hammer 0", 0, bits_hammer);
	start_mutator("bit hammer 1", 1, bits_hammer);

	watch_for(msecs);

	stop_mutators();
	for (i = 0; i < nr_vcpus; i++)
		join_worker(&vcpu_workers[i]);

	bits_sweep(&vcpu_workers[0]);
}

/* The next round would make up for what the last one has lost: look in between. */
static void run_bits(u64 msecs)
{
	int i;

	for (i = 0; i < BITS_ROUNDS; i++)
		run_bits_round(msecs / BITS_ROUNDS);

	for (i = 0; i < nr_vcpus; i++)
		pr_info("Bits, %s: %lu pages armed and cleared\n",
			vcpu_workers[i].name, vcpu_workers[i].loops);
}

/* Whether the memory is such that KVM has to map it by huge pages. */
static bool is_huge(void)
{
	int i;

	if (pages_per_backing < 512)
		return false;
	if (backing_src != VM_MEM_SRC_ANONYMOUS_THP)
		return true;

	for (i = 0; i < NR_SLOTS; i++) {
		if (!is_thp(slot_hva[i], pages_per_slot * page_size)) {
			pr_info("The host gave no transparent huge pages\n");
			return false;
		}
	}

	return true;
}

/*
 * Unmap all of the memory, and see how many faults it takes to map it again.  An
 * interrupt of the host is an exit as well, so try again if there are too many.
 */
static void check_huge_mappings(void)
{
	u64 exits = -1;
	int i;

	if (!is_huge())
		return;

	for (i = 0; i < 5 && exits >= nr_pages / 16; i++) {
		vm_userfault_arm(vm, AGENT_GPA, nr_pages * page_size);
		vm_userfault_clear(vm, AGENT_GPA, nr_pages * page_size);
		exits = bits_sweep(&vcpu_workers[0]);
		pr_info("Huge mappings: %lu exits for %lu pages\n", exits, nr_pages);
	}

	TEST_ASSERT(exits < nr_pages / 16, "Huge pages are not mapped as such");
}

static bool is_possible(enum deed deed)
{
	switch (deed) {
	case DEED_MOVE_SLOT:
	case DEED_TOGGLE_LOG:
	case DEED_GET_LOG:
		return slots_can_change();
	default:
		return true;
	}
}

/* What nobody has done yet, or NULL. */
static const char *missing_deed(void)
{
	int i;

	for (i = 0; i < nr_vcpus; i++) {
		if (!READ_ONCE(vcpu_workers[i].nr_userfaults))
			return "userfault exits of a vCPU";
	}

	for (i = 0; i < NR_DEEDS; i++) {
		if (is_possible(i) && !READ_ONCE(deeds[i]))
			return deed_names[i];
	}

	return NULL;
}

/* On a slow machine some of them may take longer. */
static void watch_all(u64 msecs)
{
	int i;

	watch_for(msecs);
	for (i = 0; i < 30 && missing_deed(); i++)
		watch_for(1000);

	TEST_ASSERT(!missing_deed(), "There is no race: no %s", missing_deed());
}

static void run_race(u64 msecs)
{
	int i;

	nr_samples = 0;
	nr_huge_samples = 0;
	memset(deeds, 0, sizeof(deeds));
	WRITE_ONCE(stop_workers, false);
	for (i = 0; i < nr_vcpus; i++) {
		vcpu_workers[i].nr_userfaults = 0;
		WRITE_ONCE(vcpu_workers[i].guest->cmd_page, CMD_END);
		vcpu_workers[i].op = race_vcpu;
		vcpu_workers[i].progress = &vcpu_workers[i].guest->progress;
		start_worker(&vcpu_workers[i], race_vcpu_main);
	}
	start_mutator("armer 0", 0, race_armer);
	start_mutator("armer 1", 1, race_armer);
	start_mutator("filler", 0, race_filler);
	start_mutator("toggler", 0, race_toggler);
	start_mutator("slots", 0, race_slots);

	watch_all(msecs);

	stop_mutators();
	WRITE_ONCE(shared->stop, true);
	for (i = 0; i < nr_vcpus; i++) {
		join_worker(&vcpu_workers[i]);
		pr_info("Race, %s: %lu accesses, %lu userfault exits, %lu MMIO exits\n",
			vcpu_workers[i].name, vcpu_workers[i].guest->progress,
			vcpu_workers[i].nr_userfaults, vcpu_workers[i].nr_mmio);
		TEST_ASSERT_EQ(vcpu_workers[i].guest->nr_no_slot, vcpu_workers[i].nr_no_slot);
	}
	for (i = 0; i < NR_DEEDS; i++)
		pr_info("Race: %lu %s\n", deeds[i], deed_names[i]);
	if (nr_samples)
		pr_info("Race: huge mappings in %lu of %lu samples\n",
			nr_huge_samples, nr_samples);
}

/* What the guest believes to have written must be what the memory holds. */
static void verify_own_words(void)
{
	u64 page, *own;
	int i;

	for (i = 0; i < nr_vcpus; i++) {
		own = addr_gva2hva(vm, (gva_t)vcpu_workers[i].guest->own);

		for (page = 0; page < nr_pages; page++)
			TEST_ASSERT(*page_own_word(page, i) == own[page],
				    "page 0x%lx: vCPU %d wrote 0x%lx, the memory holds 0x%lx",
				    page, i, own[page], *page_own_word(page, i));
	}
}

static void init_locks(void)
{
	pthread_rwlockattr_t attr;

	/* Readers come and go without end, and the writer wants its turn. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&enabled_lock, &attr);
	pthread_rwlock_init(&pre_fault_lock, &attr);
	pthread_rwlock_init(&run_lock, NULL);
}

static void init_sizes(void)
{
	u64 backing_size = get_backing_src_pagesz(backing_src);
	u64 block_size = max_t(u64, SZ_2M, backing_size);

	page_size = getpagesize();
	pages_per_backing = backing_size / page_size;
	pages_per_block = block_size / page_size;
	pages_per_slot = pages_per_block * BLOCKS_PER_SLOT;
	nr_pages = pages_per_slot * NR_SLOTS;
	TEST_ASSERT(nr_pages >= BITS_PAGES, "%lu pages", nr_pages);

	__TEST_REQUIRE(nr_pages <= MAX_PAGES, "Pages of %lu MiB are too large to race for",
		       backing_size / SZ_1M);
	__TEST_REQUIRE(!is_backing_src_hugetlb(backing_src) ||
		       has_hugetlb(backing_size, nr_pages / pages_per_backing),
		       "%lu reserved pages of %lu MiB are needed",
		       nr_pages / pages_per_backing, backing_size / SZ_1M);
}

static void add_slots(void)
{
	u64 guest_pages = pages_per_slot * page_size / vm->page_size;
	int i;

	for (i = 0; i < NR_SLOTS; i++) {
		gpa_t gpa = page_gpa(i * pages_per_slot);

		vm_userspace_mem_region_add(vm, backing_src, gpa, FIRST_SLOT + i,
					    guest_pages, 0);
		slot_hva[i] = addr_gpa2hva(vm, gpa);
	}

#ifdef __x86_64__
	/* Huge, so that shadow paging can use huge pages too. */
	virt_map_level(vm, AGENT_GPA, AGENT_GPA, nr_pages * page_size, PG_LEVEL_2M);
#else
	virt_map(vm, AGENT_GPA, AGENT_GPA, guest_pages * NR_SLOTS);
#endif
}

static void init_pages(void)
{
	u64 page;

	pages = calloc(nr_pages, sizeof(*pages));
	TEST_ASSERT(pages, "Failed to allocate page states");

	for (page = 0; page < nr_pages; page++) {
		pthread_mutex_init(&pages[page].lock, NULL);
		fill_page(page);
	}
}

static gva_t init_shared(void)
{
	gva_t gva = vm_alloc(vm, sizeof(*shared), KVM_UTIL_MIN_VADDR);

	shared = addr_gva2hva(vm, gva);
	memset(shared, 0, sizeof(*shared));
	shared->nr_pages = nr_pages;
	shared->page_size = page_size;
	set_mood(HASTE);

	return gva;
}

static gva_t alloc_guest_array(void)
{
	gva_t gva = vm_alloc(vm, nr_pages * sizeof(u64), KVM_UTIL_MIN_VADDR);

	memset(addr_gva2hva(vm, gva), 0, nr_pages * sizeof(u64));
	return gva;
}

static void init_vcpu(struct kvm_vcpu *vcpu, int idx, gva_t shared_gva)
{
	struct worker *w = &vcpu_workers[idx];

	w->name = strdup_printf("vCPU %d", idx);
	w->idx = idx;
	w->vcpu = vcpu;
	w->guest = &shared->vcpus[idx];
	w->rng = new_rng(idx);
	w->guest->seed = kvm_random_u32(&w->rng);
	w->guest->own = (u64 *)alloc_guest_array();
	w->guest->gens = (u64 *)alloc_guest_array();

	vcpu_args_set(vcpu, 2, shared_gva, (u64)idx);
}

/* For the two arrays of each vCPU, and the page tables for the test's memory. */
static u64 nr_extra_pages(void)
{
	u64 guest_page_size = vm_guest_mode_params[VM_MODE_DEFAULT].page_size;
	u64 nr_ptes = nr_pages * page_size / guest_page_size;
	u64 arrays = 2 * nr_vcpus * DIV_ROUND_UP(nr_pages * sizeof(u64), guest_page_size);
	u64 tables = 2 * DIV_ROUND_UP(nr_ptes, ptes_per_page(guest_page_size));

	return arrays + tables;
}

static void init_vm(void)
{
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	gva_t shared_gva;
	int i;

	vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, nr_vcpus, nr_extra_pages(),
				    guest_code, vcpus);
#ifdef __x86_64__
	/* Zap the memslot's mappings only, instead of the MMU as a whole. */
	slot_zaps_all = kvm_random_bool(&kvm_rng);
	if (!slot_zaps_all) {
		pr_info("Disabling KVM_X86_QUIRK_SLOT_ZAP_ALL\n");
		vm_enable_cap(vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	}
#endif
	add_slots();
	init_pages();
	shared_gva = init_shared();
	for (i = 0; i < nr_vcpus; i++)
		init_vcpu(vcpus[i], i, shared_gva);
}

static void help(char *name)
{
	puts("");
	printf("usage: %s [-h] [-v vcpus] [-t seconds] [-s type] [-r seed]\n", name);
	printf(" -v: specify the number of vCPUs to run, up to %d. (default: %d)\n",
	       MAX_VCPUS, nr_vcpus);
	printf(" -t: specify how many seconds to run. (default: 5)\n");
	backing_src_help("-s");
	printf(" -r: specify the random seed, e.g. that of a failed run.\n");
	puts("");
	exit(0);
}

int main(int argc, char *argv[])
{
	struct sigaction sa = { .sa_handler = kick_handler };
	int seconds = 5;
	int opt;

	while ((opt = getopt(argc, argv, "hv:t:s:r:")) != -1) {
		switch (opt) {
		case 'v':
			nr_vcpus = atoi_positive("Number of vCPUs", optarg);
			TEST_ASSERT(nr_vcpus <= MAX_VCPUS, "At most %d vCPUs", MAX_VCPUS);
			break;
		case 't':
			seconds = atoi_positive("Seconds", optarg);
			break;
		case 's':
			backing_src = parse_backing_src_type(optarg);
			break;
		case 'r':
			kvm_random_seed = strtoul(optarg, NULL, 0);
			break;
		case 'h':
		default:
			help(argv[0]);
			break;
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_USERFAULT) & KVM_USERFAULT_ENABLE);
	has_pre_fault = kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY);
	sigaction(SIGUSR1, &sa, NULL);

	__TEST_REQUIRE(backing_src != VM_MEM_SRC_ANONYMOUS_THP || thp_configured(),
		       "There are no transparent huge pages");

	init_locks();
	init_sizes();
	init_vm();

	vm_userfault_enable(vm);
	run_bits(seconds * 1000 / 4);
	check_huge_mappings();
	run_race(seconds * 1000 * 3 / 4);
	verify_own_words();

	/* Have KVM destroy a VM that has armed pages. */
	vm_userfault_arm(vm, AGENT_GPA, nr_pages * page_size);
	kvm_vm_free(vm);

	return 0;
}
