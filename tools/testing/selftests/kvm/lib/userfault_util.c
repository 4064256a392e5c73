// SPDX-License-Identifier: GPL-2.0-only
/*
 * Helpers for tests of KVM Userfault.
 */
#include <sys/mman.h>

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

/* A VM with one vCPU and @nr_pages of such memory, ready for userfaults. */
struct kvm_vm *agent_create_vm_with_memory(enum vm_mem_backing_src_type src,
					   u64 nr_pages, struct kvm_vcpu **vcpu)
{
	struct kvm_vm *vm = agent_create_vm(VM_SHAPE_DEFAULT, 1, vcpu);

	agent_add_memory(vm, src, AGENT_GPA, AGENT_SLOT, nr_pages, 0);
	vm_userfault_enable(vm);

	return vm;
}
