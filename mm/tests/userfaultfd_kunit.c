// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of userfaultfd on memory whose type implements only a part of
 * struct vm_uffd_ops.
 */
#include <kunit/test.h>
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/mman.h>
#include <linux/pagewalk.h>
#include <linux/userfaultfd_k.h>

#include "../internal.h"

/* Each ioctl has the page of its number to itself. */
#define TEST_SIZE	(16 * PAGE_SIZE)
#define MISSING_MINOR	(UFFDIO_REGISTER_MODE_MISSING | \
			 UFFDIO_REGISTER_MODE_MINOR)

struct uffd_test {
	struct userfaultfd_ctx ctx;
	struct file uffd;
	void __user *arg;
	struct uffdio_register reg;
};

static const struct test_type {
	const char *name;
	bool get, alloc, add, remove;
	/* What filling and UFFDIO_CONTINUE return for a shared mapping. */
	int fill, cont;
} test_types[] = {
	{ "all ops",		  1, 1, 1, 1, -EXDEV, -EFAULT },
	{ "no get_folio_noalloc", 0, 1, 1, 1, -EXDEV, -EINVAL },
	{ "no alloc_folio",	  1, 0, 1, 1, -EINVAL, -EFAULT },
	{ "no filemap_add",	  1, 1, 0, 1, -EINVAL, -EFAULT },
	{ "no filemap_remove",	  1, 1, 1, 0, -EINVAL, -EFAULT },
	{ "can_userfault only",	  0, 0, 0, 0, -EINVAL, -EINVAL },
};

KUNIT_ARRAY_PARAM_DESC(test_type, test_types, name);

static unsigned int nr_calls;

static bool test_can_userfault(struct vm_area_struct *vma, vm_flags_t vm_flags)
{
	return true;
}

static struct folio *test_get_folio_noalloc(struct inode *inode, pgoff_t pgoff)
{
	nr_calls++;
	return ERR_PTR(-ENOENT);
}

static struct folio *test_alloc_folio(struct vm_area_struct *vma,
				      unsigned long addr)
{
	nr_calls++;
	return folio_alloc(GFP_HIGHUSER_MOVABLE, 0);
}

static struct folio *test_alloc_error(struct vm_area_struct *vma,
				      unsigned long addr)
{
	nr_calls++;
	return ERR_PTR(-ENXIO);
}

static int test_filemap_add(struct folio *folio, struct vm_area_struct *vma,
			    unsigned long addr)
{
	nr_calls++;
	return -EXDEV;
}

static void test_filemap_remove(struct folio *folio, struct vm_area_struct *vma)
{
	nr_calls++;
}

static struct vm_uffd_ops partial_ops;

static const struct vm_operations_struct partial_vm_ops = {
	.uffd_ops = &partial_ops,
};

static const struct vm_operations_struct no_ops_vm_ops;

static int test_mmap_prepare(struct vm_area_desc *desc)
{
	desc->vm_ops = desc->file->private_data;
	return 0;
}

static const struct file_operations test_fops = {
	.mmap_prepare = test_mmap_prepare,
};

static unsigned long map(struct kunit *test, struct file *file,
			 unsigned long flags)
{
	unsigned long addr = kunit_vm_mmap(test, file, 0, TEST_SIZE,
					   PROT_READ | PROT_WRITE, flags, 0);

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, (void *)addr);
	return addr;
}

static void map_file(struct kunit *test,
		     const struct vm_operations_struct *vm_ops,
		     unsigned long flags)
{
	struct uffd_test *t = test->priv;
	struct file *file;

	file = anon_inode_create_getfile("[userfaultfd_kunit]", &test_fops,
					 (void *)vm_ops, O_RDWR, NULL);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, file);
	i_size_write(file_inode(file), TEST_SIZE);
	t->reg.range.start = map(test, file, flags);
	t->reg.range.len = TEST_SIZE;
	fput(file);
}

static void map_type(struct kunit *test, const struct test_type *type,
		     unsigned long flags)
{
	partial_ops = (struct vm_uffd_ops) {
		.can_userfault = test_can_userfault,
		.get_folio_noalloc = type->get ? test_get_folio_noalloc : NULL,
		.alloc_folio = type->alloc ? test_alloc_folio : NULL,
		.filemap_add = type->add ? test_filemap_add : NULL,
		.filemap_remove = type->remove ? test_filemap_remove : NULL,
	};
	map_file(test, &partial_vm_ops, flags);
}

static int test_ioctl(struct kunit *test, unsigned int cmd, void *arg)
{
	struct uffd_test *t = test->priv;
	size_t size = _IOC_SIZE(cmd);
	int ret;

	KUNIT_ASSERT_EQ(test, copy_to_user(t->arg, arg, size), 0);
	ret = userfaultfd_ioctl(&t->uffd, cmd, (unsigned long)t->arg);
	KUNIT_ASSERT_EQ(test, copy_from_user(arg, t->arg, size), 0);
	return ret;
}

static int test_register(struct kunit *test, u64 mode)
{
	struct uffd_test *t = test->priv;

	t->reg.mode = mode;
	return test_ioctl(test, UFFDIO_REGISTER, &t->reg);
}

static int resolve(struct kunit *test, unsigned int cmd, unsigned long addr)
{
	struct uffd_test *t = test->priv;
	struct uffdio_copy copy = {
		.dst = addr,
		.src = (unsigned long)t->arg,
		.len = PAGE_SIZE,
	};
	/* UFFDIO_CONTINUE and UFFDIO_POISON take the same. */
	struct uffdio_zeropage zeropage = {
		.range = { .start = addr, .len = PAGE_SIZE },
	};

	/* The arguments of UFFDIO_MOVE are those of UFFDIO_COPY. */
	if (cmd == UFFDIO_COPY || cmd == UFFDIO_MOVE)
		return test_ioctl(test, cmd, &copy);
	return test_ioctl(test, cmd, &zeropage);
}

static bool is_mapped(unsigned long addr)
{
	struct vm_area_struct *vma;
	struct folio_walk fw;

	guard(mmap_read_lock)(current->mm);
	vma = vma_lookup(current->mm, addr);
	if (!vma || !folio_walk_start(&fw, vma, addr, FW_ZEROPAGE))
		return false;
	folio_walk_end(&fw, vma);
	return true;
}

/* The ops fail, but not with -EINVAL, which says that none was called. */
static void expect(struct kunit *test, unsigned int cmd, int ret)
{
	struct uffd_test *t = test->priv;
	unsigned int nr = _IOC_NR(cmd);
	unsigned long addr = t->reg.range.start + nr * PAGE_SIZE;
	bool maps = !ret && cmd != UFFDIO_POISON;
	bool calls = ret && ret != -EINVAL;
	bool advertised = t->reg.ioctls & BIT_ULL(nr);

	nr_calls = 0;
	KUNIT_EXPECT_EQ_MSG(test, resolve(test, cmd, addr), ret, "ioctl %u", nr);
	KUNIT_EXPECT_EQ_MSG(test, nr_calls > 0, calls, "ioctl %u", nr);
	KUNIT_EXPECT_EQ_MSG(test, is_mapped(addr), maps, "ioctl %u", nr);
	KUNIT_EXPECT_EQ_MSG(test, advertised, ret != -EINVAL, "ioctl %u", nr);
}

static void test_mapping(struct kunit *test, u64 mode, int fill, int cont,
			 int poison)
{
	struct uffd_test *t = test->priv;

	KUNIT_ASSERT_EQ(test, test_register(test, mode), 0);
	expect(test, UFFDIO_COPY, fill);
	expect(test, UFFDIO_ZEROPAGE, fill);
	expect(test, UFFDIO_CONTINUE, cont);
	expect(test, UFFDIO_POISON, poison);
	expect(test, UFFDIO_MOVE, -EINVAL);
	KUNIT_EXPECT_EQ(test, test_ioctl(test, UFFDIO_UNREGISTER,
					 &t->reg.range), 0);
}

static void shared_mapping(struct kunit *test)
{
	const struct test_type *type = test->param_value;

	map_type(test, type, MAP_SHARED);
	test_mapping(test, MISSING_MINOR, type->fill, type->cont, 0);
}

/* The pages that fill a private mapping are anonymous for all types. */
static void private_mapping(struct kunit *test)
{
	const struct test_type *type = test->param_value;

	map_type(test, type, MAP_PRIVATE);
	test_mapping(test, MISSING_MINOR, 0, type->cont, 0);
}

static void alloc_folio_error(struct kunit *test)
{
	map_type(test, &test_types[0], MAP_SHARED);
	partial_ops.alloc_folio = test_alloc_error;
	test_mapping(test, MISSING_MINOR, -ENXIO, -EFAULT, 0);
}

static void no_can_userfault(struct kunit *test)
{
	map_type(test, &test_types[0], MAP_SHARED);
	partial_ops.can_userfault = NULL;
	KUNIT_EXPECT_EQ(test, test_register(test, MISSING_MINOR), -EINVAL);
	KUNIT_EXPECT_EQ(test, test_register(test, UFFDIO_REGISTER_MODE_WP),
			-EINVAL);
}

static void test_no_ops(struct kunit *test, unsigned long flags)
{
	map_file(test, &no_ops_vm_ops, flags);
	KUNIT_EXPECT_EQ(test, test_register(test, MISSING_MINOR), -EINVAL);
	test_mapping(test, UFFDIO_REGISTER_MODE_WP, -EINVAL, -EINVAL, -EINVAL);
}

/* Any memory can be registered for asynchronous write-protection. */
static void no_ops(struct kunit *test)
{
	if (!uffd_supports_wp_marker())
		kunit_skip(test, "no asynchronous write-protection");

	test_no_ops(test, MAP_SHARED);
	test_no_ops(test, MAP_PRIVATE);
}

static void init_ctx(struct userfaultfd_ctx *ctx)
{
	init_waitqueue_head(&ctx->fault_pending_wqh);
	init_waitqueue_head(&ctx->fault_wqh);
	seqcount_spinlock_init(&ctx->refile_seq, &ctx->fault_pending_wqh.lock);
	init_rwsem(&ctx->map_changing_lock);
	ctx->mm = current->mm;
}

static int uffd_test_init(struct kunit *test)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = uffd_supports_wp_marker() ? UFFD_FEATURE_WP_ASYNC : 0,
	};
	struct uffd_test *t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, t);
	test->priv = t;
	t->arg = (void __user *)map(test, NULL, MAP_ANONYMOUS | MAP_PRIVATE);
	t->uffd.private_data = &t->ctx;
	init_ctx(&t->ctx);
	return test_ioctl(test, UFFDIO_API, &api);
}

static struct kunit_case uffd_test_cases[] = {
	KUNIT_CASE_PARAM(shared_mapping, test_type_gen_params),
	KUNIT_CASE_PARAM(private_mapping, test_type_gen_params),
	KUNIT_CASE(alloc_folio_error),
	KUNIT_CASE(no_can_userfault),
	KUNIT_CASE(no_ops),
	{}
};

static struct kunit_suite uffd_test_suite = {
	.name = "userfaultfd",
	.init = uffd_test_init,
	.test_cases = uffd_test_cases,
};

kunit_test_suite(uffd_test_suite);
