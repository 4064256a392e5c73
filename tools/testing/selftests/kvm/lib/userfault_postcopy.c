// SPDX-License-Identifier: GPL-2.0-only
/*
 * The parts of a post-copy migration.
 */
#include <errno.h>
#include <linux/bitmap.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

#include "userfault_postcopy.h"
#include "userfaultfd_util.h"

#define TIMEOUT_MS	(USERFAULT_TIMEOUT_SECS * 1000)

u64 postcopy_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return timespec_to_ns(ts);
}

static void sleep_until(u64 ns)
{
	struct timespec ts = {
		.tv_sec = ns / NSEC_PER_SEC,
		.tv_nsec = ns % NSEC_PER_SEC,
	};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR)
		;
}

/*
 * Memory.
 */

struct postcopy_region *postcopy_page_region(struct postcopy_memory *mem, u64 page)
{
	struct postcopy_region *region = mem->regions;

	TEST_ASSERT(page < mem->nr_pages, "There is no page %lu", page);
	while (page >= region->first + region->nr)
		region++;

	return region;
}

void *postcopy_page_hva(struct postcopy_memory *mem, u64 page)
{
	struct postcopy_region *region = postcopy_page_region(mem, page);

	return region->hva + (page - region->first) * region->unit;
}

gpa_t postcopy_page_gpa(struct postcopy_memory *mem, u64 page)
{
	struct postcopy_region *region = postcopy_page_region(mem, page);

	return region->gpa + (page - region->first) * region->unit;
}

u64 postcopy_gpa_page(struct postcopy_memory *mem, gpa_t gpa)
{
	struct postcopy_region *region;
	int i;

	for (i = 0; i < POSTCOPY_NR_REGIONS; i++) {
		region = &mem->regions[i];
		if (gpa >= region->gpa && gpa < region->gpa + region->size)
			return region->first + (gpa - region->gpa) / region->unit;
	}

	TEST_FAIL("gpa %#lx is not in any region", gpa);
	return 0;
}

u64 postcopy_hash(u64 page, const void *data, u64 size)
{
	const u64 *words = data;
	u64 hash = page + 1;
	u64 i;

	for (i = 0; i < size / sizeof(*words); i++) {
		hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ull;
		hash ^= hash >> 29;
	}

	return hash;
}

/*
 * Messages.
 */

static bool send_all(int sock, const void *data, u64 size)
{
	ssize_t ret;

	while (size) {
		ret = send(sock, data, size, MSG_NOSIGNAL);
		if (ret < 0 && errno == EINTR)
			continue;
		if (ret <= 0)
			return false;
		data += ret;
		size -= ret;
	}

	return true;
}

/* Gives up when there is nothing for too long, see socket_setup(). */
static bool receive_all(int sock, void *data, u64 size)
{
	ssize_t ret;

	while (size) {
		ret = recv(sock, data, size, MSG_WAITALL);
		if (ret < 0 && errno == EINTR)
			continue;
		if (ret <= 0)
			return false;
		data += ret;
		size -= ret;
	}

	return true;
}

bool postcopy_send(int sock, struct postcopy_message *msg, const void *data)
{
	struct iovec iovs[] = {
		{ .iov_base = msg, .iov_len = sizeof(*msg) },
		{ .iov_base = (void *)data, .iov_len = msg->size },
	};
	struct msghdr msghdr = { .msg_iov = iovs, .msg_iovlen = 2 };
	ssize_t ret;

	msg->sent_ns = postcopy_now_ns();
	do {
		ret = sendmsg(sock, &msghdr, MSG_NOSIGNAL);
	} while (ret < 0 && errno == EINTR);

	/* What is a part of a header only can't be continued, and does not happen. */
	if (ret < (ssize_t)sizeof(*msg))
		return false;

	ret -= sizeof(*msg);
	return send_all(sock, data + ret, msg->size - ret);
}

bool postcopy_receive(int sock, struct postcopy_message *msg, void *data, u64 size)
{
	return receive_all(sock, msg, sizeof(*msg)) && msg->size <= size &&
	       receive_all(sock, data, msg->size);
}

/* A peer that does not read, or write, must not block us for ever. */
static void socket_setup(int sock, bool tcp)
{
	struct timeval timeout = { .tv_sec = USERFAULT_TIMEOUT_SECS };
	int one = 1;

	TEST_ASSERT(!setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)),
		    "SO_SNDTIMEO failed, errno %d", errno);
	TEST_ASSERT(!setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)),
		    "SO_RCVTIMEO failed, errno %d", errno);
	if (tcp)
		TEST_ASSERT(!setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)),
			    "TCP_NODELAY failed, errno %d", errno);
}

int postcopy_listen(bool tcp, struct postcopy_address *address)
{
	struct sockaddr_in *in = (struct sockaddr_in *)&address->addr;
	int sock = socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	__TEST_REQUIRE(sock >= 0, "No such socket, errno %d", errno);
	memset(address, 0, sizeof(*address));
	address->addr.ss_family = tcp ? AF_INET : AF_UNIX;
	/* The kernel picks a port resp. an abstract name. */
	address->size = tcp ? sizeof(*in) : sizeof(sa_family_t);
	if (tcp)
		in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);

	TEST_ASSERT(!bind(sock, (void *)&address->addr, address->size),
		    "bind() failed, errno %d", errno);
	TEST_ASSERT(!listen(sock, 8), "listen() failed, errno %d", errno);
	address->size = sizeof(address->addr);
	TEST_ASSERT(!getsockname(sock, (void *)&address->addr, &address->size),
		    "getsockname() failed, errno %d", errno);

	return sock;
}

int postcopy_connect(const struct postcopy_address *address)
{
	bool tcp = address->addr.ss_family == AF_INET;
	int sock = socket(address->addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	TEST_ASSERT(sock >= 0, "socket() failed, errno %d", errno);
	if (connect(sock, (void *)&address->addr, address->size)) {
		close(sock);
		return -1;
	}
	socket_setup(sock, tcp);

	return sock;
}

int postcopy_accept(int listener)
{
	struct pollfd pollfd = { .fd = listener, .events = POLLIN };
	struct sockaddr_storage addr;
	socklen_t size = sizeof(addr);
	int sock;

	TEST_ASSERT(poll(&pollfd, 1, TIMEOUT_MS) == 1, "Nobody connects");
	sock = accept(listener, (void *)&addr, &size);
	TEST_ASSERT(sock >= 0, "accept() failed, errno %d", errno);
	socket_setup(sock, addr.ss_family == AF_INET);

	return sock;
}

/*
 * The page server: what it is asked for goes first, then what it may stream.
 */

/* How many messages later a page comes a second time. */
#define SERVER_NR_LATE	8

struct server {
	const struct postcopy_options *opts;
	struct postcopy_memory *mem;
	enum postcopy_failure failure;
	int sock;

	unsigned long *todo;
	u64 nr_todo;
	u64 credits;
	u64 cursor;

	u64 nr_sent;
	/* At this page things go wrong. */
	u64 fail_at;
	u64 late[SERVER_NR_LATE];

	/* A message that is still on its way. */
	struct postcopy_message msg;
	bool has_msg;
	void *buf;
};

static void server_send_raw(struct server *s, u64 page, bool streamed,
			    const void *data, u64 sum)
{
	struct postcopy_message msg = {
		.type = POSTCOPY_PAGE,
		.streamed = streamed,
		.arg = page,
		.size = postcopy_page_region(s->mem, page)->unit,
		.sum = sum,
	};

	/* If that fails it is noticed when the next message is to be received. */
	postcopy_send(s->sock, &msg, data);
}

/* A flipped bit, or the content of another page. */
static void server_send_wrong(struct server *s, u64 page, bool streamed, u64 sum)
{
	u64 unit = postcopy_page_region(s->mem, page)->unit;
	u64 other = page ? page - 1 : page + 1;
	void *data = postcopy_page_hva(s->mem, page);

	if (s->nr_sent % 2 && postcopy_page_region(s->mem, other)->unit == unit) {
		data = postcopy_page_hva(s->mem, other);
		sum = postcopy_hash(other, data, unit);
		return server_send_raw(s, page, streamed, data, sum);
	}

	memcpy(s->buf, data, unit);
	((u8 *)s->buf)[s->nr_sent % unit] ^= 0x10;
	server_send_raw(s, page, streamed, s->buf, sum);
}

static void server_send_again(struct server *s, u64 page)
{
	void *data = postcopy_page_hva(s->mem, page);
	u64 unit = postcopy_page_region(s->mem, page)->unit;

	server_send_raw(s, page, false, data, postcopy_hash(page, data, unit));
}

static void server_send_late(struct server *s, u64 page)
{
	u64 *late = &s->late[s->nr_sent % SERVER_NR_LATE];

	if (s->nr_sent >= SERVER_NR_LATE)
		server_send_again(s, *late);
	*late = page;
}

/* The rest of it never comes. */
static void server_cut_connection(struct server *s, u64 page)
{
	struct postcopy_message msg = {
		.type = POSTCOPY_PAGE,
		.arg = page,
		.size = postcopy_page_region(s->mem, page)->unit,
	};

	send_all(s->sock, &msg, sizeof(msg));
	send_all(s->sock, postcopy_page_hva(s->mem, page), msg.size / 2);
	shutdown(s->sock, SHUT_RDWR);
	_exit(0);
}

/* Returns true if the page is not to be sent as it is. */
static bool server_fail(struct server *s, u64 page, bool streamed, bool again, u64 sum)
{
	bool now = s->nr_sent == s->fail_at;

	switch (s->failure) {
	case POSTCOPY_SOURCE_KILLED:
		if (now)
			kill(getppid(), SIGKILL);
		fallthrough;
	case POSTCOPY_SERVER_KILLED:
		if (now)
			raise(SIGKILL);
		return false;
	case POSTCOPY_CONNECTION_CUT:
		if (now)
			server_cut_connection(s, page);
		return false;
	case POSTCOPY_DUPLICATE_PAGES:
		server_send_late(s, page);
		return false;
	case POSTCOPY_WRONG_PAGES:
		if (again || s->nr_sent % 4)
			return false;
		break;
	case POSTCOPY_ONLY_WRONG_PAGES:
		if (s->nr_sent < s->fail_at)
			return false;
		break;
	default:
		return false;
	}

	server_send_wrong(s, page, streamed, sum);
	return true;
}

static void server_send_page(struct server *s, u64 page, bool streamed, bool again)
{
	void *data = postcopy_page_hva(s->mem, page);
	u64 sum = postcopy_hash(page, data, postcopy_page_region(s->mem, page)->unit);

	if (test_bit(page, s->todo)) {
		clear_bit(page, s->todo);
		s->nr_todo--;
	}
	if (!server_fail(s, page, streamed, again, sum))
		server_send_raw(s, page, streamed, data, sum);
	s->nr_sent++;
}

static void server_stream(struct server *s)
{
	while (!test_bit(s->cursor, s->todo))
		s->cursor++;

	s->credits--;
	server_send_page(s, s->cursor, true, false);
}

static bool server_handle(struct server *s)
{
	u64 arg = s->msg.arg;

	switch (s->msg.type) {
	case POSTCOPY_REQUEST:
		TEST_ASSERT(arg < s->mem->nr_pages, "Asked for page %lu", arg);
		/* Else it is on its way. */
		if (test_bit(arg, s->todo))
			server_send_page(s, arg, false, false);
		return true;
	case POSTCOPY_AGAIN:
		server_send_page(s, arg, false, true);
		return true;
	case POSTCOPY_CREDIT:
		s->credits += arg;
		return true;
	default:
		return false;
	}
}

static bool server_is_readable(struct server *s, int timeout)
{
	struct pollfd pollfd = { .fd = s->sock, .events = POLLIN };

	return poll(&pollfd, 1, timeout) > 0;
}

/* Send or receive one message, returns false at the end. */
static bool server_step(struct server *s)
{
	bool can_stream = s->credits && s->nr_todo;
	u64 due;

	if (!s->has_msg) {
		if (server_is_readable(s, can_stream ? 0 : TIMEOUT_MS))
			s->has_msg = postcopy_receive(s->sock, &s->msg, NULL, 0);
		else if (can_stream)
			goto stream;
		if (!s->has_msg)
			return false;
	}

	due = s->msg.sent_ns + s->opts->latency_us * 1000;
	if (!can_stream || postcopy_now_ns() >= due) {
		sleep_until(due);
		s->has_msg = false;
		return server_handle(s);
	}
stream:
	server_stream(s);
	return true;
}

void postcopy_serve(int sock, const struct postcopy_options *opts,
		    struct postcopy_memory *mem, enum postcopy_failure failure)
{
	struct server s = {
		.opts = opts,
		.mem = mem,
		.failure = failure,
		.sock = sock,
		.todo = bitmap_zalloc(mem->nr_pages),
		.buf = malloc(mem->max_unit),
	};
	u64 page;

	if (!postcopy_receive(sock, &s.msg, s.todo,
			      BITS_TO_LONGS(mem->nr_pages) * sizeof(long)) ||
	    s.msg.type != POSTCOPY_MISSING)
		return;

	for (page = 0; page < mem->nr_pages; page++)
		s.nr_todo += test_bit(page, s.todo);
	s.fail_at = s.nr_todo / 4;

	while (server_step(&s))
		;
	free(s.todo);
	free(s.buf);
}

/*
 * The pager: what the VMM shares with it.
 */

static void futex_wait(u32 *word, u32 value, u64 ms)
{
	struct timespec timeout = {
		.tv_sec = ms / 1000,
		.tv_nsec = ms % 1000 * 1000000,
	};

	syscall(__NR_futex, word, FUTEX_WAIT, value, &timeout, NULL, 0);
}

static void futex_wake(u32 *word)
{
	syscall(__NR_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void count(u64 *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

struct postcopy_shared *postcopy_shared_alloc(u64 max_pages)
{
	struct postcopy_shared *shared;

	shared = kvm_mmap(struct_size(shared, pages, max_pages), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS, -1);
	shared->max_pages = max_pages;
	return shared;
}

u32 postcopy_mark_asked(struct postcopy_shared *shared, u64 page, u32 by)
{
	struct postcopy_page *p = &shared->pages[page];
	u64 never = 0;

	if (by == POSTCOPY_ASKED_BY_EXIT)
		count(&shared->stats.exits);
	else if (by == POSTCOPY_ASKED_BY_QUEUE)
		count(&shared->stats.records);
	else
		count(&shared->stats.uffd_events);

	/* Not any later than anybody's request. */
	__atomic_compare_exchange_n(&p->asked_ns, &never, postcopy_now_ns(), false,
				    __ATOMIC_RELAXED, __ATOMIC_RELAXED);

	return __atomic_fetch_or(&p->state, by, __ATOMIC_ACQ_REL);
}

bool postcopy_wait_for_page(struct postcopy_shared *shared, u64 page)
{
	u32 *word = &shared->pages[page].state;
	u64 now, end = userfault_now_ms() + TIMEOUT_MS;
	u32 state;

	for (;;) {
		state = __atomic_load_n(word, __ATOMIC_ACQUIRE);
		if (state & POSTCOPY_PLACED)
			return true;
		if (state & POSTCOPY_LOST)
			return false;
		now = userfault_now_ms();
		TEST_ASSERT(now < end, "Page %lu does not come", page);
		futex_wait(word, state, end - now);
	}
}

/*
 * The bitmap of the userfault file.
 */

static u64 region_bitmap_offset(struct postcopy_region *region)
{
	return region->gpa / getpagesize() / 8;
}

u8 *postcopy_map_bitmap(int userfault_fd, struct postcopy_region *region)
{
	u64 offset = region_bitmap_offset(region) & (getpagesize() - 1ull);
	u64 size = offset + DIV_ROUND_UP(region->size / getpagesize(), 8);

	return __kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, userfault_fd,
			  region_bitmap_offset(region) - offset) + offset;
}

void postcopy_unmap_bitmap(u8 *bitmap, struct postcopy_region *region)
{
	u64 offset = region_bitmap_offset(region) & (getpagesize() - 1ull);

	kvm_munmap(bitmap - offset, offset + DIV_ROUND_UP(region->size / getpagesize(), 8));
}

/* Pairs with KVM's load-acquire: the content is there when the bit is not. */
void postcopy_clear_bits(u8 *bitmap, struct postcopy_region *region, u64 page)
{
	u64 per_page = region->unit / getpagesize();
	u64 bit = (page - region->first) * per_page;
	u64 end = bit + per_page;

	for (; bit < end; bit++)
		__atomic_fetch_and(&bitmap[bit / 8], ~BIT(bit % 8), __ATOMIC_RELEASE);
}

u64 postcopy_count_bits(u8 *bitmap, struct postcopy_region *region, u64 page)
{
	u64 per_page = region->unit / getpagesize();
	u64 bit = (page - region->first) * per_page;
	u64 end = bit + per_page;
	u64 nr = 0;

	for (; bit < end; bit++)
		nr += !!(__atomic_load_n(&bitmap[bit / 8], __ATOMIC_RELAXED) & BIT(bit % 8));

	return nr;
}

/*
 * Placing pages.
 */

static void pager_copy_uffd(struct postcopy_pager *pager, u64 page, const void *data)
{
	struct postcopy_region *region = postcopy_page_region(&pager->mem, page);
	void *addr = region->vmm_hva + (page - region->first) * region->unit;
	int uffd = pager->uffds[page * pager->nr_uffds / pager->mem.nr_pages];
	s64 ret;

	do {
		ret = __uffd_copy(uffd, addr, data, region->unit, 0);
	} while (ret == -EAGAIN);

	/* The VMM may be gone, if this is a process of its own. */
	TEST_ASSERT(ret == region->unit || ret == -ESRCH, "UFFDIO_COPY returned %ld", ret);
}

/* Nobody but us has a right to clear the bit, and that not before the page is filled. */
static void pager_assert_armed(struct postcopy_pager *pager, u64 page)
{
	struct postcopy_region *region = postcopy_page_region(&pager->mem, page);
	u8 *bitmap = pager->bitmaps[region - pager->mem.regions];

	if (pager->userfault_fd >= 0)
		TEST_ASSERT(postcopy_count_bits(bitmap, region, page) ==
			    region->unit / getpagesize(),
			    "Page %lu is not armed any more", page);
}

static void pager_fill(struct postcopy_pager *pager, u64 page, const void *data)
{
	u64 unit = postcopy_page_region(&pager->mem, page)->unit;
	void *hva = postcopy_page_hva(&pager->mem, page);

	if (postcopy_uses_uffd(pager->opts)) {
		pager->shared->pages[page].hash = postcopy_hash(page, data, unit);
		pager_copy_uffd(pager, page, data);
	} else {
		memcpy(hva, data, unit);
		pager->shared->pages[page].hash = postcopy_hash(page, hva, unit);
	}
	pager_assert_armed(pager, page);
}

static void pager_clear(struct postcopy_pager *pager, u64 page)
{
	struct postcopy_region *region = postcopy_page_region(&pager->mem, page);

	if (pager->userfault_fd >= 0)
		postcopy_clear_bits(pager->bitmaps[region - pager->mem.regions], region, page);
}

static void pager_resolve(struct postcopy_pager *pager, u64 page, u32 flags, int error)
{
	int ret = __userfault_resolve(pager->userfault_fd,
				      postcopy_page_gpa(&pager->mem, page),
				      postcopy_page_region(&pager->mem, page)->unit,
				      flags, error);

	TEST_ASSERT(!ret || errno == ENODEV, KVM_IOCTL_ERROR(KVM_USERFAULT_RESOLVE, ret));
}

/* UFFDIO_COPY has woken those that came before it. */
static void pager_wake(struct postcopy_pager *pager, u64 page, u32 state)
{
	if (state & POSTCOPY_ASKED_BY_QUEUE)
		pager_resolve(pager, page, KVM_USERFAULT_WAKE_ONLY, 0);
	if (state & POSTCOPY_ASKED_BY_EXIT)
		futex_wake(&pager->shared->pages[page].state);
}

/* Returns false if the page was, or is being, placed already. */
static bool pager_place(struct postcopy_pager *pager, u64 page, const void *data)
{
	struct postcopy_shared *shared = pager->shared;
	struct postcopy_page *p = &shared->pages[page];
	u32 state;

	state = __atomic_fetch_or(&p->state, POSTCOPY_PLACING, __ATOMIC_ACQ_REL);
	if (state & (POSTCOPY_PLACING | POSTCOPY_PLACED))
		return false;

	pager_fill(pager, page, data);
	pager_clear(pager, page);
	/* Whoever asks from now on wakes himself. */
	state = __atomic_fetch_or(&p->state, POSTCOPY_PLACED, __ATOMIC_ACQ_REL);
	pager_wake(pager, page, state);

	if (state & POSTCOPY_ASKED)
		p->latency_ns = postcopy_now_ns() - p->asked_ns;
	if (p->zero)
		count(&shared->stats.zero);
	else if (state & POSTCOPY_ASKED)
		count(&shared->stats.asked);
	else
		count(&shared->stats.streamed);

	if (!__atomic_sub_fetch(&shared->remaining, 1, __ATOMIC_ACQ_REL))
		futex_wake(&shared->remaining);

	return true;
}

static void pager_place_zero(struct postcopy_pager *pager, u64 page)
{
	void *zeroes = calloc(1, pager->mem.max_unit);

	TEST_ASSERT(zeroes, "Out of memory");
	pager_place(pager, page, zeroes);
	free(zeroes);
}

/*
 * The stream.
 */

void postcopy_window_reset(struct postcopy_window *window)
{
	window->size = POSTCOPY_MIN_WINDOW;
	window->since_fault = 0;
}

void postcopy_window_fault(struct postcopy_window *window)
{
	window->size = max_t(u64, window->size / 2, POSTCOPY_MIN_WINDOW);
	window->since_fault = 0;
}

void postcopy_window_streamed(struct postcopy_window *window)
{
	if (++window->since_fault < window->size)
		return;

	window->size = min_t(u64, window->size * 2, POSTCOPY_MAX_WINDOW);
	window->since_fault = 0;
}

static void pager_update_window(struct postcopy_pager *pager,
				void (*update)(struct postcopy_window *window))
{
	struct postcopy_stats *stats = &pager->shared->stats;
	u64 old = pager->window.size;

	update(&pager->window);
	stats->window_grown += pager->window.size > old;
	stats->window_shrunk += pager->window.size < old;
	stats->max_window = max(stats->max_window, pager->window.size);
	WRITE_ONCE(stats->window, pager->window.size);
}

/*
 * The stream stops half way if no fault has found a window to cut: there still are pages
 * then that the guest is going to need.
 */
static u64 pager_max_outstanding(struct postcopy_pager *pager)
{
	u64 left = __atomic_load_n(&pager->shared->remaining, __ATOMIC_ACQUIRE);

	if (pager->shared->stats.window_faults || left < pager->held ||
	    pager->window.size == POSTCOPY_MIN_WINDOW)
		return pager->window.size;

	return min(pager->window.size, left - pager->held);
}

/* The first page is for who needs it: the guest is to start before the stream. */
static void pager_give_credit(struct postcopy_pager *pager)
{
	struct postcopy_stats *stats = &pager->shared->stats;
	u64 max = pager_max_outstanding(pager);
	u64 nr;

	if (!READ_ONCE(pager->shared->started) ||
	    !(READ_ONCE(stats->exits) + READ_ONCE(stats->records) +
	      READ_ONCE(stats->uffd_events)))
		return;

	if (max <= pager->outstanding)
		return;

	nr = max - pager->outstanding;
	pager->outstanding += nr;
	postcopy_send_arg(pager->sock, POSTCOPY_CREDIT, nr);
}

static void pager_request(struct postcopy_pager *pager, u64 page)
{
	/* If the connection is lost, the page is asked for again with the next one. */
	pthread_mutex_lock(&pager->lock);
	if (pager->window.size > POSTCOPY_MIN_WINDOW)
		count(&pager->shared->stats.window_faults);
	pager_update_window(pager, postcopy_window_fault);
	postcopy_send_arg(pager->sock, POSTCOPY_REQUEST, page);
	pager_give_credit(pager);
	pthread_mutex_unlock(&pager->lock);
}

static void pager_got_streamed(struct postcopy_pager *pager)
{
	pthread_mutex_lock(&pager->lock);
	if (pager->outstanding)
		pager->outstanding--;
	pager_update_window(pager, postcopy_window_streamed);
	pager_give_credit(pager);
	pthread_mutex_unlock(&pager->lock);
}

void postcopy_ask(struct postcopy_pager *pager, u64 page, u32 state, u32 by)
{
	struct postcopy_region *region = postcopy_page_region(&pager->mem, page);
	u32 i;

	if (state & POSTCOPY_PLACED) {
		/* Perhaps woken before it slept, and perhaps not at all. */
		pager_wake(pager, page, by);
		for (i = 0; by == POSTCOPY_ASKED_BY_UFFD && i < pager->nr_uffds; i++)
			__uffd_wake(pager->uffds[i],
				    region->vmm_hva + (page - region->first) * region->unit,
				    region->unit);
	} else if (state & POSTCOPY_LOST) {
		if (by == POSTCOPY_ASKED_BY_QUEUE)
			pager_resolve(pager, page, 0, EFAULT);
	} else if (pager->shared->pages[page].zero) {
		pager_place_zero(pager, page);
	} else if (!(state & POSTCOPY_ASKED)) {
		pager_request(pager, page);
	}
}

/* Nothing more will come: let all accesses fail, now and later. */
static void pager_lose(struct postcopy_pager *pager)
{
	struct postcopy_page *p;
	u64 page;
	u32 state;

	for (page = 0; page < pager->mem.nr_pages; page++) {
		p = &pager->shared->pages[page];
		state = __atomic_fetch_or(&p->state, POSTCOPY_LOST, __ATOMIC_ACQ_REL);
		if (state & POSTCOPY_PLACED)
			continue;
		if (state & POSTCOPY_ASKED_BY_QUEUE)
			pager_resolve(pager, page, 0, EFAULT);
		if (state & POSTCOPY_ASKED_BY_EXIT)
			futex_wake(&p->state);
	}
	__atomic_store_n(&pager->shared->lost, 1, __ATOMIC_RELEASE);
	futex_wake(&pager->shared->remaining);
}

/*
 * The connection.
 */

#define MAX_RECONNECTS	3

static bool page_is_missing(struct postcopy_page *p)
{
	return !p->zero && !(__atomic_load_n(&p->state, __ATOMIC_ACQUIRE) &
			     (POSTCOPY_PLACING | POSTCOPY_PLACED));
}

static void pager_send_missing(struct postcopy_pager *pager)
{
	struct postcopy_message msg = {
		.type = POSTCOPY_MISSING,
		.size = BITS_TO_LONGS(pager->mem.nr_pages) * sizeof(long),
	};
	struct postcopy_page *pages = pager->shared->pages;
	unsigned long *missing = bitmap_zalloc(pager->mem.nr_pages);
	u64 page;

	for (page = 0; page < pager->mem.nr_pages; page++) {
		if (page_is_missing(&pages[page]))
			set_bit(page, missing);
	}
	postcopy_send(pager->sock, &msg, missing);

	for (page = 0; page < pager->mem.nr_pages; page++) {
		if (test_bit(page, missing) && READ_ONCE(pages[page].state) & POSTCOPY_ASKED)
			postcopy_send_arg(pager->sock, POSTCOPY_REQUEST, page);
	}
	free(missing);
}

static bool pager_connect(struct postcopy_pager *pager)
{
	pthread_mutex_lock(&pager->lock);
	if (pager->sock >= 0)
		close(pager->sock);
	pager->sock = postcopy_connect(pager->address);
	pager->outstanding = 0;
	postcopy_window_reset(&pager->window);
	WRITE_ONCE(pager->shared->stats.window, pager->window.size);
	if (pager->sock >= 0) {
		pager_send_missing(pager);
		pager_give_credit(pager);
	}
	pthread_mutex_unlock(&pager->lock);

	return pager->sock >= 0;
}

static bool pager_reconnect(struct postcopy_pager *pager)
{
	count(&pager->shared->stats.reconnects);

	return pager->shared->stats.reconnects <= MAX_RECONNECTS && pager_connect(pager);
}

/* Returns false if the page is never going to be good. */
static bool pager_handle_wrong(struct postcopy_pager *pager, u64 page)
{
	struct postcopy_page *p = &pager->shared->pages[page];

	count(&pager->shared->stats.wrong);
	if (!page_is_missing(p))
		return true;
	if (++p->nr_wrong > MAX_RECONNECTS)
		return false;

	pthread_mutex_lock(&pager->lock);
	postcopy_send_arg(pager->sock, POSTCOPY_AGAIN, page);
	pthread_mutex_unlock(&pager->lock);
	return true;
}

enum received {
	RECEIVED,
	RECEIVED_NOTHING,	/* The connection is of no use. */
	RECEIVED_RUBBISH,	/* And there is nothing better. */
};

static enum received pager_receive(struct postcopy_pager *pager, void *buf)
{
	struct postcopy_message msg;

	if (!postcopy_receive(pager->sock, &msg, buf, pager->mem.max_unit) ||
	    msg.type != POSTCOPY_PAGE || msg.arg >= pager->mem.nr_pages ||
	    msg.size != postcopy_page_region(&pager->mem, msg.arg)->unit)
		return RECEIVED_NOTHING;

	TEST_ASSERT(!pager->shared->pages[msg.arg].zero,
		    "Page %lu was sent, and is known to be zero", msg.arg);
	pager->last = msg.arg;
	sleep_until(msg.sent_ns + pager->opts->latency_us * 1000);
	if (msg.sum != postcopy_hash(msg.arg, buf, msg.size)) {
		if (!pager_handle_wrong(pager, msg.arg))
			return RECEIVED_RUBBISH;
	} else if (pager_place(pager, msg.arg, buf)) {
		pager->shared->pages[msg.arg].sent_at_once = !msg.streamed;
	} else {
		count(&pager->shared->stats.duplicates);
	}
	if (msg.streamed)
		pager_got_streamed(pager);

	return RECEIVED;
}

static void *pager_receiver(void *arg)
{
	struct postcopy_pager *pager = arg;
	u32 *remaining = &pager->shared->remaining;
	void *buf = malloc(pager->mem.max_unit);
	enum received received;
	u64 page;
	u32 half;

	for (page = 0; page < pager->mem.nr_pages; page++) {
		if (pager->shared->pages[page].zero)
			pager_place_zero(pager, page);
	}
	half = __atomic_load_n(remaining, __ATOMIC_ACQUIRE) / 2;
	/* Of huge pages, the guest may have asked for all at once. */
	if (pager->mem.max_unit == getpagesize())
		pager->held = half;

	while (__atomic_load_n(remaining, __ATOMIC_ACQUIRE)) {
		if (pager->opts->failure == POSTCOPY_DESTINATION_KILLED && *remaining < half)
			kill(pager->shared->vmm_pid, SIGKILL);

		received = pager_receive(pager, buf);
		if (received == RECEIVED_RUBBISH ||
		    (received == RECEIVED_NOTHING && !pager_reconnect(pager))) {
			pager_lose(pager);
			break;
		}
	}
	free(buf);
	return NULL;
}

/*
 * Those who learn that a page is needed.
 */

/* Returns false when it is time to stop. */
static bool pager_wait(struct postcopy_pager *pager, int fd)
{
	struct pollfd pollfds[] = {
		{ .fd = fd, .events = POLLIN },
		{ .fd = pager->stop_fd, .events = POLLIN },
	};
	int ret;

	do {
		ret = poll(pollfds, ARRAY_SIZE(pollfds), -1);
	} while (ret < 0 && errno == EINTR);

	TEST_ASSERT(ret > 0, "poll() failed, errno %d", errno);
	return !pollfds[1].revents && pollfds[0].revents & POLLIN;
}

static void pager_mark_and_ask(struct postcopy_pager *pager, u64 page, u32 by)
{
	postcopy_ask(pager, page, postcopy_mark_asked(pager->shared, page, by), by);
}

static void *pager_queue_reader(void *arg)
{
	struct postcopy_pager *pager = arg;
	struct kvm_userfault_event events[16];
	ssize_t ret, i;

	while (pager_wait(pager, pager->userfault_fd)) {
		ret = read(pager->userfault_fd, events, sizeof(events));
		if (!ret)
			break;
		TEST_ASSERT(ret > 0 && !(ret % sizeof(*events)),
			    "read() returned %ld, errno %d", ret, errno);
		for (i = 0; i < ret / sizeof(*events); i++)
			pager_mark_and_ask(pager,
					   postcopy_gpa_page(&pager->mem, events[i].gpa),
					   POSTCOPY_ASKED_BY_QUEUE);
	}

	return NULL;
}

struct uffd_reader {
	struct postcopy_pager *pager;
	int uffd;
};

static u64 pager_hva_page(struct postcopy_pager *pager, u64 hva)
{
	struct postcopy_region *region = pager->mem.regions;

	while (hva - (u64)region->vmm_hva >= region->size) {
		region++;
		TEST_ASSERT(region < pager->mem.regions + POSTCOPY_NR_REGIONS,
			    "hva %#lx is not in any region", hva);
	}

	return region->first + (hva - (u64)region->vmm_hva) / region->unit;
}

static void *pager_uffd_reader(void *arg)
{
	struct uffd_reader *reader = arg;
	struct postcopy_pager *pager = reader->pager;
	struct uffd_msg msg;
	ssize_t ret;

	while (pager_wait(pager, reader->uffd)) {
		ret = read(reader->uffd, &msg, sizeof(msg));
		if (ret < 0 && errno == EAGAIN)
			continue;
		TEST_ASSERT(ret == sizeof(msg) && msg.event == UFFD_EVENT_PAGEFAULT,
			    "read() returned %ld, errno %d", ret, errno);
		pager_mark_and_ask(pager, pager_hva_page(pager, msg.arg.pagefault.address),
				   POSTCOPY_ASKED_BY_UFFD);
	}

	free(reader);
	return NULL;
}

/* vCPUs of another process have marked the page themselves. */
static void *pager_asked_reader(void *arg)
{
	struct postcopy_pager *pager = arg;
	u64 asked[2];

	while (pager_wait(pager, pager->asked_fd)) {
		TEST_ASSERT_EQ(read(pager->asked_fd, asked, sizeof(asked)), sizeof(asked));
		postcopy_ask(pager, asked[0], asked[1], POSTCOPY_ASKED_BY_EXIT);
	}

	return NULL;
}

static void pager_add_thread(struct postcopy_pager *pager, void *(*fn)(void *arg), void *arg)
{
	kvm_pthread_create(&pager->threads[pager->nr_threads++], NULL, fn, arg);
}

void postcopy_pager_start(struct postcopy_pager *pager)
{
	struct uffd_reader *reader;
	u32 i;

	pthread_mutex_init(&pager->lock, NULL);
	pager->sock = -1;
	pager->held = 0;
	pager->nr_threads = 0;
	pager->stop_fd = eventfd(0, EFD_CLOEXEC);
	TEST_ASSERT(pager->stop_fd >= 0, "eventfd() failed, errno %d", errno);
	TEST_ASSERT(pager_connect(pager), "There is no page server");

	for (i = 0; pager->userfault_fd >= 0 && i < POSTCOPY_NR_REGIONS; i++)
		pager->bitmaps[i] = postcopy_map_bitmap(pager->userfault_fd,
							&pager->mem.regions[i]);

	pager_add_thread(pager, pager_receiver, pager);
	if (postcopy_uses_queue(pager->opts))
		pager_add_thread(pager, pager_queue_reader, pager);
	if (pager->asked_fd >= 0)
		pager_add_thread(pager, pager_asked_reader, pager);
	for (i = 0; i < pager->nr_uffds; i++) {
		reader = malloc(sizeof(*reader));
		*reader = (struct uffd_reader) { pager, pager->uffds[i] };
		pager_add_thread(pager, pager_uffd_reader, reader);
	}
}

/* Until the server has seen that nothing more is wanted. */
static void pager_receive_late(struct postcopy_pager *pager)
{
	u64 duplicates = pager->shared->stats.duplicates;
	u64 page = pager->shared->late_page;
	void *buf = malloc(pager->mem.max_unit);

	postcopy_send_arg(pager->sock, POSTCOPY_AGAIN, page);
	shutdown(pager->sock, SHUT_WR);
	while (pager_receive(pager, buf) == RECEIVED)
		;
	TEST_ASSERT(pager->last == page && pager->shared->stats.duplicates > duplicates,
		    "Page %lu did not come again", page);
	free(buf);
}

/* When all pages are there, or lost. */
void postcopy_pager_stop(struct postcopy_pager *pager)
{
	u64 one = 1;
	u32 i;

	TEST_ASSERT_EQ(write(pager->stop_fd, &one, sizeof(one)), sizeof(one));
	for (i = 0; i < pager->nr_threads; i++)
		kvm_pthread_join(pager->threads[i], NULL);
	if (pager->opts->failure == POSTCOPY_DUPLICATE_PAGES)
		pager_receive_late(pager);
	if (pager->sock >= 0)
		close(pager->sock);
	close(pager->stop_fd);
}
