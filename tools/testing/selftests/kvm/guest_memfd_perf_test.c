// SPDX-License-Identifier: GPL-2.0-only
/*
 * What it costs to fill guest memory from userspace, and to resolve faults on its
 * mapping by userfaultfd: a guest_memfd next to shmem.
 *
 * A benchmark, which fails only if something does not work.  Every figure is the
 * best of several rounds over all pages.
 */
#include <getopt.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include <linux/falloc.h>

#include "kvm_util.h"
#include "test_util.h"
#include "userfaultfd_util.h"

static u64 nr_pages = 512;
static int nr_rounds = 3;

static u64 page_size;
static u64 size;

struct memory {
	const char *name;
	int fd;
	/* Registered with userfaultfd, and not. */
	u8 *mem;
	u8 *alias;
	int uffd;
};

#define NR_MEMORIES	2

static struct memory memories[NR_MEMORIES];
static u8 *src;

static u64 now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return timespec_to_ns(ts);
}

static void memory_init(struct memory *m, const char *name, int fd)
{
	m->name = name;
	m->fd = fd;
	m->mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	m->alias = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	m->uffd = uffd_open(0);
	uffd_register(m->uffd, m->mem, size,
		      UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
}

static void memory_release(struct memory *m)
{
	kvm_munmap(m->mem, size);
	kvm_munmap(m->alias, size);
	close(m->uffd);
	close(m->fd);
}

static void memory_empty(struct memory *m)
{
	kvm_fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, size);
}

static void memory_populate(struct memory *m)
{
	memory_empty(m);
	memcpy(m->alias, src, size);
}

/*
 * Ways to fill memory, without anybody who waits for it.
 */

static void do_copy(struct memory *m)
{
	u64 i;

	for (i = 0; i < size; i += page_size)
		TEST_ASSERT_EQ(__uffd_copy(m->uffd, m->mem + i, src + i, page_size, 0),
			       page_size);
}

static void do_copy_all(struct memory *m)
{
	TEST_ASSERT_EQ(__uffd_copy(m->uffd, m->mem, src, size, 0), size);
}

static void do_write(struct memory *m)
{
	u64 i;

	for (i = 0; i < size; i += page_size)
		TEST_ASSERT_EQ(pwrite(m->fd, src + i, page_size, i), page_size);
}

static void do_write_all(struct memory *m)
{
	TEST_ASSERT_EQ(pwrite(m->fd, src, size, 0), size);
}

static void do_continue(struct memory *m)
{
	u64 i;

	for (i = 0; i < size; i += page_size)
		TEST_ASSERT_EQ(__uffd_continue(m->uffd, m->mem + i, page_size, 0),
			       page_size);
}

static void do_write_continue(struct memory *m)
{
	u64 i;

	for (i = 0; i < size; i += page_size) {
		TEST_ASSERT_EQ(pwrite(m->fd, src + i, page_size, i), page_size);
		TEST_ASSERT_EQ(__uffd_continue(m->uffd, m->mem + i, page_size, 0),
			       page_size);
	}
}

static void do_memcpy_continue(struct memory *m)
{
	u64 i;

	for (i = 0; i < size; i += page_size) {
		memcpy(m->alias + i, src + i, page_size);
		TEST_ASSERT_EQ(__uffd_continue(m->uffd, m->mem + i, page_size, 0),
			       page_size);
	}
}

static void do_memcpy(struct memory *m)
{
	u64 i;

	for (i = 0; i < size; i += page_size)
		memcpy(m->alias + i, src + i, page_size);
}

/*
 * Faults: a thread reads all pages, and this one resolves what it stops at.
 */

static void *reader_thread(void *arg)
{
	struct memory *m = arg;
	u64 i;

	for (i = 0; i < size; i += page_size)
		READ_ONCE(m->mem[i]);

	return NULL;
}

static void wait_for_fault(struct memory *m, u64 offset)
{
	struct uffd_msg msg;
	ssize_t ret;

	ret = read(m->uffd, &msg, sizeof(msg));
	TEST_ASSERT(ret == sizeof(msg), "read() returned %ld, errno %d", ret, errno);
	TEST_ASSERT_EQ(msg.arg.pagefault.address, (u64)m->mem + offset);
}

static void do_faults(struct memory *m, bool minor)
{
	pthread_t thread;
	u64 i;

	kvm_pthread_create(&thread, NULL, reader_thread, m);
	for (i = 0; i < size; i += page_size) {
		wait_for_fault(m, i);
		if (minor)
			__uffd_continue(m->uffd, m->mem + i, page_size, 0);
		else
			__uffd_copy(m->uffd, m->mem + i, src + i, page_size, 0);
	}
	kvm_pthread_join(thread, NULL);
}

static void do_minor_faults(struct memory *m)
{
	do_faults(m, true);
}

static void do_missing_faults(struct memory *m)
{
	do_faults(m, false);
}

static u64 measure_round(struct memory *m, void (*prepare)(struct memory *),
			 void (*fn)(struct memory *))
{
	u64 start;

	prepare(m);
	start = now_ns();
	fn(m);

	return (now_ns() - start) / nr_pages;
}

/* By turns, for both kinds of memory to see the system in the same state. */
static void measure(const char *what, void (*prepare)(struct memory *),
		    void (*fn)(struct memory *))
{
	u64 best[NR_MEMORIES];
	int i, j;

	memset(best, -1, sizeof(best));
	for (i = 0; i < nr_rounds; i++) {
		for (j = 0; j < NR_MEMORIES; j++)
			best[j] = min(best[j], measure_round(&memories[j], prepare, fn));
	}

	pr_info("%-24s", what);
	for (j = 0; j < NR_MEMORIES; j++) {
		memory_empty(&memories[j]);
		pr_info(" %12lu", best[j]);
	}
	pr_info("\n");
}

static void measure_all(bool can_write)
{
	pr_info("%-24s %12s %12s\n", "ns per page", memories[0].name, memories[1].name);
	measure("MINOR fault, CONTINUE", memory_populate, do_minor_faults);
	measure("MISSING fault, COPY", memory_empty, do_missing_faults);
	measure("CONTINUE", memory_populate, do_continue);
	measure("COPY", memory_empty, do_copy);
	measure("COPY, all at once", memory_empty, do_copy_all);
	measure("memcpy()", memory_empty, do_memcpy);
	measure("memcpy() and CONTINUE", memory_empty, do_memcpy_continue);
	if (!can_write)
		return;

	measure("write()", memory_empty, do_write);
	measure("write(), all at once", memory_empty, do_write_all);
	measure("write() and CONTINUE", memory_empty, do_write_continue);
}

static bool has_gmem_uffd(void)
{
	int uffd = __uffd_open(UFFD_FEATURE_MISSING_GUEST_MEMFD |
			       UFFD_FEATURE_MINOR_GUEST_MEMFD);

	if (uffd >= 0)
		close(uffd);

	return uffd >= 0;
}

/* Blocking, as there is nothing else to wait for. */
static void set_blocking(int fd)
{
	TEST_ASSERT(!fcntl(fd, F_SETFL, 0), "fcntl() failed, errno %d", errno);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-n pages] [-r rounds]\n", name);
	exit(0);
}

int main(int argc, char *argv[])
{
	u64 flags = MAPPABLE_GUEST_MEMFD_FLAGS;
	struct kvm_vm *vm;
	bool can_write;
	int opt, i;

	while ((opt = getopt(argc, argv, "hn:r:")) != -1) {
		switch (opt) {
		case 'n':
			nr_pages = atoi_positive("Number of pages", optarg);
			break;
		case 'r':
			nr_rounds = atoi_positive("Number of rounds", optarg);
			break;
		default:
			help(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_has_mappable_guest_memfd());
	TEST_REQUIRE(has_gmem_uffd());

	page_size = getpagesize();
	size = nr_pages * page_size;
	src = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	memset(src, 0xaa, size);

	can_write = kvm_has_guest_memfd_flags(GUEST_MEMFD_FLAG_WRITE);
	if (can_write)
		flags |= GUEST_MEMFD_FLAG_WRITE;

	vm = vm_create_barebones();
	memory_init(&memories[0], "shmem", kvm_memfd_alloc(size, false));
	memory_init(&memories[1], "guest_memfd", vm_create_guest_memfd(vm, size, flags));
	for (i = 0; i < NR_MEMORIES; i++)
		set_blocking(memories[i].uffd);

	measure_all(can_write);

	for (i = 0; i < NR_MEMORIES; i++)
		memory_release(&memories[i]);
	kvm_munmap(src, size);
	kvm_vm_free(vm);

	return 0;
}
