/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The parts of a post-copy migration: messages between the hosts, the page server
 * at the source, and the pager at the destination.  What uses them is
 * userfault_postcopy_test.
 */
#ifndef SELFTEST_KVM_USERFAULT_POSTCOPY_H
#define SELFTEST_KVM_USERFAULT_POSTCOPY_H

#include <pthread.h>
#include <sys/socket.h>

#include "kvm_util.h"
#include "test_util.h"
#include "userfault_util.h"

/* What stops accesses to pages that have not arrived. */
enum postcopy_mode {
	POSTCOPY_USERFAULT,	/* Exits of vCPUs, and the queue for KVM's accesses */
	POSTCOPY_ASYNC,		/* The queue for all accesses */
	POSTCOPY_UFFD,		/* One userfaultfd */
	POSTCOPY_UFFD_VCPU,	/* A userfaultfd per vCPU */
	POSTCOPY_BOTH,		/* Exits of vCPUs, and userfaultfd for KVM's accesses */
	NR_POSTCOPY_MODES,
};

/* What goes wrong. */
enum postcopy_failure {
	POSTCOPY_NO_FAILURE,
	POSTCOPY_SERVER_KILLED,		/* The page server is, and gets replaced */
	POSTCOPY_CONNECTION_CUT,	/* In the middle of a page */
	POSTCOPY_DUPLICATE_PAGES,	/* Each page comes once more, one after the end */
	POSTCOPY_WRONG_PAGES,		/* Some pages do not have their content */
	POSTCOPY_ONLY_WRONG_PAGES,	/* No page has, from some time on */
	POSTCOPY_SOURCE_KILLED,
	POSTCOPY_DESTINATION_KILLED,
	NR_POSTCOPY_FAILURES,
};

struct postcopy_options {
	enum postcopy_mode mode;
	enum postcopy_failure failure;
	enum vm_mem_backing_src_type src;
	bool external_pager;
	bool tcp;
	bool progress;
	u32 nr_vcpus;
	u32 rounds;
	u64 latency_us;
	u64 size;
};

/* How a process ends that knows that the migration can't. */
#define POSTCOPY_EXIT_LOST	3

static inline bool postcopy_uses_userfault(const struct postcopy_options *opts)
{
	return opts->mode != POSTCOPY_UFFD && opts->mode != POSTCOPY_UFFD_VCPU;
}

static inline bool postcopy_uses_queue(const struct postcopy_options *opts)
{
	return opts->mode == POSTCOPY_USERFAULT || opts->mode == POSTCOPY_ASYNC;
}

static inline bool postcopy_uses_uffd(const struct postcopy_options *opts)
{
	return !postcopy_uses_queue(opts);
}

u64 postcopy_now_ns(void);

/*
 * The memory of a VM.  Pages are numbered across all regions; @unit is how much of
 * a region is moved at once.
 */
struct postcopy_region {
	gpa_t gpa;
	u64 size;
	u64 unit;
	u64 first;
	u64 nr;
	u32 slot;
	/* Shared memory, or -1. */
	int fd;
	/* Where this process, and where the VMM has it. */
	void *hva;
	void *vmm_hva;
};

#define POSTCOPY_NR_REGIONS	2

struct postcopy_memory {
	struct postcopy_region regions[POSTCOPY_NR_REGIONS];
	u64 nr_pages;
	u64 max_unit;
};

struct postcopy_region *postcopy_page_region(struct postcopy_memory *mem, u64 page);
void *postcopy_page_hva(struct postcopy_memory *mem, u64 page);
gpa_t postcopy_page_gpa(struct postcopy_memory *mem, u64 page);
u64 postcopy_gpa_page(struct postcopy_memory *mem, gpa_t gpa);

/* Two pages with the same content have different hashes. */
u64 postcopy_hash(u64 page, const void *data, u64 size);

/*
 * Messages.
 */

enum postcopy_message_type {
	/* On the connection between the VMMs. */
	POSTCOPY_ZERO = 1,	/* @sum pages from @arg on are zero */
	POSTCOPY_SWITCH,	/* Bitmaps of stale pages, and of those that are zero */
	POSTCOPY_VM,		/* State of the VM */
	POSTCOPY_VCPU,		/* State of vCPU @arg */
	POSTCOPY_START,		/* The destination is in charge now */
	POSTCOPY_DONE,		/* The destination has all pages */
	POSTCOPY_HASHES,	/* The hash of each page of a region */
	/* Between page server and pager. */
	POSTCOPY_MISSING,	/* Bitmap of the pages to send */
	POSTCOPY_REQUEST,	/* Page @arg is needed */
	POSTCOPY_AGAIN,		/* Page @arg was not good */
	POSTCOPY_CREDIT,	/* @arg more pages can be sent without being asked for */
	/* On both. */
	POSTCOPY_PAGE,		/* Content of page @arg, with the hash @sum */
};

struct postcopy_message {
	u32 type;
	u32 streamed;
	u64 arg;
	u64 size;
	u64 sum;
	u64 sent_ns;
};

/* These fail if the other side is gone, or says nothing for too long. */
bool postcopy_send(int sock, struct postcopy_message *msg, const void *data);
bool postcopy_receive(int sock, struct postcopy_message *msg, void *data, u64 size);

static inline bool postcopy_send_arg(int sock, u32 type, u64 arg)
{
	struct postcopy_message msg = { .type = type, .arg = arg };

	return postcopy_send(sock, &msg, NULL);
}

/* Where the source listens. */
struct postcopy_address {
	struct sockaddr_storage addr;
	socklen_t size;
};

int postcopy_listen(bool tcp, struct postcopy_address *address);
int postcopy_connect(const struct postcopy_address *address);
int postcopy_accept(int listener);

/* Serve pages until the other side closes @sock.  @failure is what to get wrong. */
void postcopy_serve(int sock, const struct postcopy_options *opts,
		    struct postcopy_memory *mem, enum postcopy_failure failure);

/*
 * The pager.
 */

/* Of a page: who waits for it, and how far it is. */
#define POSTCOPY_ASKED_BY_EXIT	BIT(0)
#define POSTCOPY_ASKED_BY_QUEUE	BIT(1)
#define POSTCOPY_ASKED_BY_UFFD	BIT(2)
#define POSTCOPY_ASKED		(POSTCOPY_ASKED_BY_EXIT | POSTCOPY_ASKED_BY_QUEUE | \
				 POSTCOPY_ASKED_BY_UFFD)
#define POSTCOPY_PLACING	BIT(3)
#define POSTCOPY_PLACED		BIT(4)
#define POSTCOPY_LOST		BIT(5)

struct postcopy_page {
	u32 state;
	bool zero;
	/* It came since it was asked for, not by the stream. */
	bool sent_at_once;
	u8 nr_wrong;
	u64 asked_ns;
	/* Between being asked for and having been placed. */
	u64 latency_ns;
	/* Of what was placed. */
	u64 hash;
};

struct postcopy_stats {
	u64 exits;
	u64 records;
	u64 uffd_events;
	u64 zero;
	u64 asked;
	u64 streamed;
	u64 duplicates;
	u64 wrong;
	u64 reconnects;
	u64 window;
	u64 max_window;
	/* How often it did that, and how many faults found it larger than the least. */
	u64 window_grown;
	u64 window_shrunk;
	u64 window_faults;
};

/* What the VMM and a pager in another process have in common. */
struct postcopy_shared {
	/* vCPUs run, so the stream can begin. */
	u32 started;
	/* There are pages that nobody has. */
	u32 lost;
	/* Who is killed to see what happens. */
	pid_t vmm_pid;
	/* Pages to be placed. */
	u32 remaining;
	/* The one that comes when everything is over. */
	u64 late_page;
	struct postcopy_stats stats;
	u64 max_pages;
	struct postcopy_page pages[];
};

#define POSTCOPY_MAX_UFFDS	64

/*
 * How many pages may be on their way that nobody has asked for.  A page that is asked
 * for comes behind all of these.  So the window doubles when it has been filled with no
 * fault in between, and each fault cuts it in half.
 */
struct postcopy_window {
	u64 size;
	u64 since_fault;
};

#define POSTCOPY_MIN_WINDOW	1
#define POSTCOPY_MAX_WINDOW	64

void postcopy_window_reset(struct postcopy_window *window);
void postcopy_window_fault(struct postcopy_window *window);
void postcopy_window_streamed(struct postcopy_window *window);

struct postcopy_pager {
	const struct postcopy_options *opts;
	const struct postcopy_address *address;
	struct postcopy_shared *shared;
	struct postcopy_memory mem;

	/* The userfault file and its bitmap, or -1. */
	int userfault_fd;
	u8 *bitmaps[POSTCOPY_NR_REGIONS];
	/* Page P belongs to uffds[P * nr_uffds / nr_pages]. */
	int uffds[POSTCOPY_MAX_UFFDS];
	u32 nr_uffds;
	/* Page numbers from vCPUs of another process, or -1. */
	int asked_fd;

	/* Protects the connection, for senders, and the window. */
	pthread_mutex_t lock;
	int sock;
	struct postcopy_window window;
	u64 outstanding;
	/* How many pages wait for the first fault that cuts the window. */
	u32 held;
	/* The page that came last. */
	u64 last;

	int stop_fd;
	pthread_t threads[POSTCOPY_MAX_UFFDS + 3];
	u32 nr_threads;
};

struct postcopy_shared *postcopy_shared_alloc(u64 max_pages);
u8 *postcopy_map_bitmap(int userfault_fd, struct postcopy_region *region);
void postcopy_unmap_bitmap(u8 *bitmap, struct postcopy_region *region);
u64 postcopy_count_bits(u8 *bitmap, struct postcopy_region *region, u64 page);
void postcopy_clear_bits(u8 *bitmap, struct postcopy_region *region, u64 page);

void postcopy_pager_start(struct postcopy_pager *pager);
void postcopy_pager_stop(struct postcopy_pager *pager);

/* Note that a page is needed; returns what was known about it before. */
u32 postcopy_mark_asked(struct postcopy_shared *shared, u64 page, u32 by);
/* Get a page that has been marked.  This can place it at once. */
void postcopy_ask(struct postcopy_pager *pager, u64 page, u32 state, u32 by);
/* Wait until a page is there, or return false. */
bool postcopy_wait_for_page(struct postcopy_shared *shared, u64 page);

/*
 * By the architecture's part of userfault_postcopy_test.
 */

/* What moves, other than memory.  Big enough for any. */
#define POSTCOPY_MAX_STATE	SZ_256K

u64 arch_save_vm(struct kvm_vm *vm, void *buf);
void arch_load_vm(struct kvm_vm *vm, void *buf);
u64 arch_save_vcpu(struct kvm_vcpu *vcpu, void *buf);
void arch_load_vcpu(struct kvm_vcpu *vcpu, void *buf);

/* Let KVM itself use the first POSTCOPY_KVM_BYTES of the page whenever the vCPU runs. */
#define POSTCOPY_KVM_BYTES	128

void arch_setup_kvm_page(struct kvm_vcpu *vcpu, gpa_t gpa);

/* In the guest: the interrupt controller is set up, and is still as it was. */
void arch_guest_setup_irqchip(u64 vcpu_id);
bool arch_guest_check_irqchip(u64 vcpu_id);

/* In the guest: let KVM read a word, if it can. In the host: what it has read. */
void arch_guest_emulate(u32 *word);
bool arch_get_emulated(struct kvm_vcpu *vcpu, u32 *word);

/* How many huge mappings the guest has, if that can be known. */
bool arch_get_huge_mappings(struct kvm_vm *vm, u64 *nr);

#endif /* SELFTEST_KVM_USERFAULT_POSTCOPY_H */
