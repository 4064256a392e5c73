// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM Userfault for a guest with memory tags, on arm64.  Tags are part of a
 * page's content: whoever fills the page writes them before the guest gets it.  And
 * what is mapped or filled page by page must not show the guest the tags that somebody
 * else has left in the memory around.
 */
#include <linux/sizes.h>
#include <sys/prctl.h>

#include "kselftest_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfault_util.h"

#include <asm/sysreg.h>

#ifndef PROT_MTE
#define PROT_MTE		0x20
#endif

#define GRANULE_SIZE		16
#define HUGE_SIZE		SZ_2M

/* Normal memory, write-back, with tags. */
#define MAIR_ATTR_NORMAL_TAGGED	UL(0xf0)

/* The tag of a granule is in the uppermost byte of its address. */
#define TAG_SHIFT		56
#define TAG_MASK		0xf

#define STALE_TAG		0xb

#define MTE_ASM			".arch armv8.5-a\n\t.arch_extension memtag\n\t"

static u64 load_tag(u64 addr)
{
	u64 tag = 0;

	asm volatile(MTE_ASM "ldg %0, [%1]" : "+r" (tag) : "r" (addr) : "memory");
	return (tag >> TAG_SHIFT) & TAG_MASK;
}

static void store_tag(u64 addr, u64 tag)
{
	asm volatile(MTE_ASM "stg %0, [%1]" : : "r" (tag << TAG_SHIFT), "r" (addr) : "memory");
}

/* Tags that differ from page to page and from granule to granule, none of them 0. */
static u8 tag_of(u64 page, u64 granule)
{
	return (page + granule) % TAG_MASK + 1;
}

/* To @nr_pages pages at @hva, which has to be mapped with PROT_MTE. */
static void store_tags(void *hva, u64 first_page, u64 nr_pages)
{
	u64 granules = getpagesize() / GRANULE_SIZE;
	u64 i;

	for (i = 0; i < nr_pages * granules; i++)
		store_tag((u64)hva + i * GRANULE_SIZE,
			  tag_of(first_page + i / granules, i % granules));
}

/*
 * The guest's side.
 */

static u64 guest_page_size;

static u64 guest_load_tag(u64 gva)
{
	return load_tag(gva);
}

static u64 guest_store_tag(u64 gva)
{
	store_tag(gva, TAG_MASK);
	return 0;
}

/* How many granules of the page at @gva don't have the tags of store_tags()? */
static u64 guest_count_wrong_tags(u64 gva)
{
	u64 page = (gva - AGENT_GPA) / guest_page_size;
	u64 granules = guest_page_size / GRANULE_SIZE;
	u64 nr = 0, i;

	for (i = 0; i < granules; i++)
		nr += load_tag(gva + i * GRANULE_SIZE) != tag_of(page, i);
	return nr;
}

/* How many granules of the test's first @size bytes have a tag? */
static u64 guest_count_tags(u64 size)
{
	u64 nr = 0, offset;

	for (offset = 0; offset < size; offset += GRANULE_SIZE)
		nr += load_tag(AGENT_GPA + offset) != 0;
	return nr;
}

FIXTURE(mte) {
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	void *hva;
	int fd;
};

#define mte_data FIXTURE_DATA(mte)

static void vcpu_enable_tags(struct kvm_vcpu *vcpu)
{
	u64 mair = vcpu_get_reg(vcpu, KVM_ARM64_SYS_REG(SYS_MAIR_EL1));
	u64 sctlr = vcpu_get_reg(vcpu, KVM_ARM64_SYS_REG(SYS_SCTLR_EL1));

	mair &= ~MAIR_ATTRIDX(0xfful, MT_NORMAL);
	mair |= MAIR_ATTRIDX(MAIR_ATTR_NORMAL_TAGGED, MT_NORMAL);
	vcpu_set_reg(vcpu, KVM_ARM64_SYS_REG(SYS_MAIR_EL1), mair);
	vcpu_set_reg(vcpu, KVM_ARM64_SYS_REG(SYS_SCTLR_EL1), sctlr | SCTLR_ELx_ATA);
}

FIXTURE_SETUP(mte)
{
	struct kvm_vcpu_init init = {};

	self->vm = __vm_create(VM_SHAPE_DEFAULT, 1, 0);
	vm_enable_cap(self->vm, KVM_CAP_ARM_MTE, 0);

	/* At EL1, whatever the machine could do. */
	vm_ioctl(self->vm, KVM_ARM_PREFERRED_TARGET, &init);
	self->vcpu = aarch64_vcpu_add(self->vm, 0, &init, agent_guest_code);
	kvm_arch_vm_finalize_vcpus(self->vm);
	vcpu_args_set(self->vcpu, 1, 0);
	vcpu_enable_tags(self->vcpu);

	guest_page_size = getpagesize();
	sync_global_to_guest(self->vm, guest_page_size);
	vm_userfault_enable_async(self->vm, 0);
	self->fd = vm_create_userfault_fd(self->vm);
}

FIXTURE_TEARDOWN(mte)
{
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

static void add_memory(mte_data *self, enum vm_mem_backing_src_type src, u64 nr_pages)
{
	self->hva = agent_add_memory(self->vm, src, AGENT_GPA, AGENT_SLOT, nr_pages, 0);
}

static u64 call(mte_data *self, u64 (*fn)(u64 arg), u64 arg)
{
	return agent_do(self->vcpu, AGENT_EXEC, (gva_t)fn, arg);
}

static void copy_tags(mte_data *self, u64 page, u8 *tags, u64 flags)
{
	struct kvm_arm_copy_mte_tags copy = {
		.guest_ipa = page_gpa(page),
		.length = getpagesize(),
		.addr = tags,
		.flags = flags,
	};

	TEST_ASSERT_EQ(__vm_ioctl(self->vm, KVM_ARM_MTE_COPY_TAGS, &copy), getpagesize());
}

/* By KVM_ARM_MTE_COPY_TAGS, what store_tags() stores. */
static void put_tags(mte_data *self, u64 page)
{
	u8 tags[SZ_64K / GRANULE_SIZE];
	int i;

	for (i = 0; i < getpagesize() / GRANULE_SIZE; i++)
		tags[i] = tag_of(page, i);
	copy_tags(self, page, tags, KVM_ARM_TAGS_TO_GUEST);
}

static void assert_no_tags(mte_data *self, u64 page)
{
	u8 tags[SZ_64K / GRANULE_SIZE];
	int i;

	copy_tags(self, page, tags, KVM_ARM_TAGS_FROM_GUEST);
	for (i = 0; i < getpagesize() / GRANULE_SIZE; i++)
		TEST_ASSERT(!tags[i], "Page %lu has tag %#x at %#x", page, tags[i],
			    i * GRANULE_SIZE);
}

/*
 * Tags come with the content.
 */

/* Tags may be there before the content is. */
userfault_test(mte, copying_tags_is_exempt)
{
	add_memory(self, VM_MEM_SRC_ANONYMOUS, NR_PAGES);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * getpagesize());
	put_tags(self, 3);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, userfault_records), 0);
	assert_no_tags(self, 4);

	agent_expect_userfault(self->vcpu, AGENT_EXEC, (gva_t)guest_count_wrong_tags,
			       page_gpa(3), page_gpa(3), USERFAULT_READ);
	vm_userfault_clear(self->vm, page_gpa(3), getpagesize());
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(3), 0),
		       agent_page_content(page_gpa(3)));
}

/* What a pager does that must not take slots_lock. */
userfault_test(mte, tags_by_a_mapping)
{
	u64 page_size = getpagesize();

	add_memory(self, VM_MEM_SRC_ANONYMOUS, NR_PAGES);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * page_size);
	agent_expect_userfault(self->vcpu, AGENT_EXEC, (gva_t)guest_count_wrong_tags,
			       page_gpa(5), page_gpa(5), USERFAULT_READ);

	TEST_ASSERT(!mprotect(self->hva + 5 * page_size, page_size,
			      PROT_READ | PROT_WRITE | PROT_MTE),
		    "mprotect(PROT_MTE) failed, errno %d", errno);
	store_tags(self->hva + 5 * page_size, 5, 1);
	userfault_resolve(self->fd, page_gpa(5), page_size, 0, 0);
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);
}

/* A load of a tag needs the page like any load, and a store is a write. */
userfault_test(mte, accesses_to_tags_fault)
{
	add_memory(self, VM_MEM_SRC_ANONYMOUS, NR_PAGES);
	vm_userfault_arm(self->vm, AGENT_GPA, NR_PAGES * getpagesize());
	agent_expect_userfault(self->vcpu, AGENT_EXEC, (gva_t)guest_load_tag, page_gpa(1),
			       page_gpa(1), USERFAULT_READ);
	vm_userfault_clear(self->vm, page_gpa(1), getpagesize());
	TEST_ASSERT_EQ(agent_finish(self->vcpu), 0);

	agent_expect_userfault(self->vcpu, AGENT_EXEC, (gva_t)guest_store_tag, page_gpa(2),
			       page_gpa(2), USERFAULT_WRITE);
	vm_userfault_clear(self->vm, page_gpa(2), getpagesize());
	agent_finish(self->vcpu);
	TEST_ASSERT_EQ(call(self, guest_load_tag, page_gpa(2)), TAG_MASK);
}

/*
 * Tags of others.
 */

/* Free memory of a kind, with tags.  It is likely to be what is allocated next. */
static void leave_stale_tags(int flags, u64 size)
{
	void *mem = __kvm_mmap(size, PROT_READ | PROT_WRITE | PROT_MTE,
			       MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
	u64 offset;

	if (!(flags & MAP_HUGETLB))
		kvm_madvise(mem, size, MADV_HUGEPAGE);
	for (offset = 0; offset < size; offset += GRANULE_SIZE)
		store_tag((u64)mem + offset, STALE_TAG);
	kvm_munmap(mem, size);
}

static bool add_hugetlb(mte_data *self)
{
	if (!has_hugetlb(HUGE_SIZE, 8))
		return false;

	leave_stale_tags(MAP_HUGETLB, 8 * HUGE_SIZE);
	add_memory(self, VM_MEM_SRC_ANONYMOUS_HUGETLB_2MB, HUGE_SIZE / getpagesize());
	return true;
}

/* The tags of one page are known, but the huge page is marked as a whole. */
userfault_test(mte, hugetlb_page_that_gets_tags)
{
	if (!add_hugetlb(self))
		SKIP(return, "No huge pages");

	put_tags(self, 7);
	assert_no_tags(self, 6);
	assert_no_tags(self, 8);
	TEST_ASSERT_EQ(call(self, guest_count_tags, HUGE_SIZE),
		       getpagesize() / GRANULE_SIZE);
}

/* One page of it can be mapped, as all others are armed. */
userfault_test(mte, hugetlb_page_that_is_mapped_alone)
{
	u64 size = getpagesize();

	if (!add_hugetlb(self))
		SKIP(return, "No huge pages");

	vm_userfault_arm(self->vm, AGENT_GPA, HUGE_SIZE);
	vm_userfault_clear(self->vm, page_gpa(7), size);
	TEST_ASSERT_EQ(agent_do(self->vcpu, AGENT_READ, page_gpa(7), 0),
		       agent_page_content(page_gpa(7)));
	assert_no_tags(self, 6);
	assert_no_tags(self, 8);
	vm_userfault_clear(self->vm, AGENT_GPA, HUGE_SIZE);
	TEST_ASSERT_EQ(call(self, guest_count_tags, HUGE_SIZE), 0);
}

/* A write maps the whole block, of which dirty logging let a single page be mapped. */
userfault_test(mte, block_that_a_permission_fault_maps)
{
	leave_stale_tags(0, 16 * HUGE_SIZE);
	add_memory(self, VM_MEM_SRC_ANONYMOUS_THP, HUGE_SIZE / getpagesize());
	if (!is_thp(self->hva, HUGE_SIZE))
		SKIP(return, "No transparent huge pages");

	vm_mem_region_set_flags(self->vm, AGENT_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	agent_do(self->vcpu, AGENT_READ, page_gpa(7), 0);
	vm_mem_region_set_flags(self->vm, AGENT_SLOT, 0);
	agent_do(self->vcpu, AGENT_WRITE, page_gpa(7), 1);
	TEST_ASSERT_EQ(call(self, guest_count_tags, HUGE_SIZE), 0);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_USERFAULT) & KVM_USERFAULT_ASYNC);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_ARM_MTE));

	return test_harness_run(argc, argv);
}
