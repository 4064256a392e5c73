/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Model of virt/kvm/userfault_queue.c and userfault_file.c: accesses that wait for
 * one armed page, pagers that read their records and resolve the page, or die on
 * the way, and a process that kills a waiter and disables userfault.
 *
 * What the model checks:
 *  - no lost wake-up, no lost record, no deadlock: an access ends, whatever happens
 *    and as long as there is a pager. Nobody is left over, but pagers that sleep in
 *    read() and have nothing to read (an invalid end state is an error);
 *  - no use after free: nobody touches a waiter that is not on its stack;
 *  - no access succeeds while its page is not filled.
 *
 * Locks: `bl` is the lock of the page's bucket, taken and released in steps of their
 * own. uf->lock, the inner one, protects data that nobody reads without it: its
 * critical sections are atomic, but for that of add_record(), whose unlock can be
 * delayed by the store buffer.
 *
 * Memory: what is written and then read by others without a lock goes through a store
 * buffer, which the process drain() empties whenever it likes. A full barrier waits
 * until one's own buffer is empty; loads do not wait. That lets a store pass the
 * loads that follow it, which is what the two barriers are there for.
 *
 * Each of the BREAK_* macros takes out one thing, and must make the check fail.
 */

#ifndef NW
#define NW	2		/* accesses */
#endif
#ifndef NP
#define NP	2		/* pagers, each with a file of its own */
#endif

#define NONE	255		/* of a record: not in the queue */
#define PENDING	254		/* of a record: nobody has read it; else who has */

/* The page. */
bool armed = true;
bool filled = false;
bool resolved = false;		/* the pagers are done with it */

/* struct kvm_userfault */
bool on = true;		/* uf->kvm */
byte nr_waiters = 0;
byte nr_pagers = NP;
bool orphaned = false;
bool ul = false;		/* uf->lock, as far as it is not an atomic {} */
bool bl = false;		/* bucket->lock */

/* struct kvm_userfault_waiter */
bool on_stack[NW];
bool in_bucket[NW];
byte record[NW] = NONE;
byte id[NW];			/* enough of it: how many times this one waited */
bool woken[NW];
bool failed[NW];		/* waiter->error */

/* The tasks. */
bool sleeping[NW];
bool killed[NW];
bool reader_sleeps[NP];		/* in uf->wqh, exclusively */

/* Store buffers. */
bool sb_wait[NW];		/* nr_waiters + 1, and then uf->lock released */
bool sb_clear[NP];		/* armed = false */
bool sb_disable;		/* on = false */

active proctype drain()
{
end:	do
	:: atomic { sb_wait[0] -> nr_waiters++; ul = false; sb_wait[0] = false }
#if NW > 1
	:: atomic { sb_wait[1] -> nr_waiters++; ul = false; sb_wait[1] = false }
#endif
	:: atomic { sb_clear[0] -> armed = false; sb_clear[0] = false }
#if NP > 1
	:: atomic { sb_clear[1] -> armed = false; sb_clear[1] = false }
#endif
	:: atomic { sb_disable -> on = false; sb_disable = false }
	od
}

inline lock_bucket()	{ atomic { !bl -> bl = true } }
inline unlock_bucket()	{ bl = false }

/* kvm_userfault_notify(): one reader that sleeps, for one record. */
inline notify_one()
{
	atomic {
		if
		:: reader_sleeps[0] -> reader_sleeps[0] = false
#if NP > 1
		:: reader_sleeps[1] -> reader_sleeps[1] = false
#endif
		:: else
		fi
	}
}

/*
 * kvm_userfault_wake(). Whether a waiter is there is looked up without a lock, after
 * a barrier, for which the caller's buffer has to be empty.
 */
inline wake(buffer, fail)
{
#ifndef BREAK_WAKER_BARRIER
	!buffer;
#endif
	if
	:: nr_waiters == 0
	:: else ->
		lock_bucket();
		i = 0;
		do
		:: i < NW && in_bucket[i] ->
			/* kvm_userfault_wake_waiter() */
			atomic {
				!ul ->
				assert(on_stack[i]);
				in_bucket[i] = false;
				record[i] = NONE;
				failed[i] = fail
			}
			woken[i] = true;
			/* wake_up_process(waiter->task) */
			atomic {
				assert(on_stack[i]);
				sleeping[i] = false;
				i++
			}
		:: i < NW && !in_bucket[i] -> i++
		:: i == NW -> i = 0; break
		od;
		unlock_bucket()
	fi
}

/*
 * An access: kvm_userfault_wait().
 */
proctype access(byte w)
{
	bool error = false, eintr = false, no_record;

	do
	/* kvm_userfault_blocked() */
	:: !error && !eintr && on && armed ->
		/* kvm_userfault_wait_once() */
		atomic {
			on_stack[w] = true;
			woken[w] = false;
			failed[w] = false;
			id[w]++
		}

		/* kvm_userfault_add_waiter(), but for nr_waiters: see add_record() */
		lock_bucket();
		in_bucket[w] = true;
		unlock_bucket();

		/*
		 * kvm_userfault_add_record(). The lock is released once nr_waiters,
		 * which was incremented before, is visible to everybody. That may be
		 * later than what follows.
		 */
		atomic { !ul -> ul = true };
		atomic {
			if
			:: !on || sb_disable ->	/* uf->kvm, under the lock */
#ifndef BREAK_CLOSED_CHECK
				skip
#else
				record[w] = PENDING
#endif
#ifndef BREAK_ORPHANED_CHECK
			/* A page that the last pager cleared is no reason to fail. */
			:: on && !sb_disable && orphaned ->
#ifndef BREAK_ORPHANED_TEST
				error = armed
#else
				error = true
#endif
				assert(armed || !error)
			:: on && !sb_disable && !orphaned -> record[w] = PENDING
#else
			:: on && !sb_disable -> record[w] = PENDING
#endif
			fi;
			no_record = (record[w] == NONE);
			sb_wait[w] = true
		}

		if
		/* Without a record, look at the bit again. */
		:: no_record
		:: else ->
#ifndef BREAK_NOTIFY
			/* The waitqueue's lock comes after uf->lock was released. */
			notify_one();
#endif
			/* kvm_userfault_sleep() */
			do
			::
#ifndef BREAK_STATE_FIRST
				/* set_current_state() */
				sleeping[w] = true;
#ifndef BREAK_WAITER_BARRIER
				!sb_wait[w];
#endif
#endif
				if
				:: woken[w] -> break
#ifndef BREAK_RECHECK
#ifndef BREAK_CLOSED_CHECK
				:: !woken[w] && !(on && armed) -> break
				:: !woken[w] && on && armed
#else
				:: !woken[w] && !armed -> break
				:: !woken[w] && armed
#endif
#else
				:: !woken[w]
#endif
				fi;
#ifndef BREAK_SIGNAL
				if
				:: killed[w] -> eintr = true; break
				:: else
				fi;
#endif
#ifdef BREAK_STATE_FIRST
				sleeping[w] = true;
				!sb_wait[w];
#endif
				/* schedule() */
				!sleeping[w]
			od;
			sleeping[w] = false
		fi;

		/* kvm_userfault_del_waiter() */
#ifdef BREAK_DEL_LOCK
		if
		:: woken[w]
		:: else ->
#endif
		lock_bucket();
		atomic {
			!ul ->
			in_bucket[w] = false;
			record[w] = NONE
		};
		unlock_bucket();
#ifdef BREAK_DEL_LOCK
		fi;
#endif
		/* atomic_dec(): not before the atomic_inc(). */
		atomic { !sb_wait[w] -> nr_waiters-- };
		atomic {
			error = error || failed[w];
			on_stack[w] = false
		}
	:: !error && !eintr && !(on && armed) ->
		/* The access goes on. */
		assert(filled || !on);
		break
	:: error || eintr -> break
	od
}

/*
 * kvm_userfault_file_release(), which is also what happens to a pager that is killed.
 */
inline del_pager()
{
	atomic {
		!ul ->
		n = 0;
		i = 0;
		do
		:: i < NW ->
#ifndef BREAK_TAKE_BACK
			if
			:: record[i] == p ->
				assert(on_stack[i]);
				record[i] = PENDING
			:: else
			fi;
#endif
			/* Also those that this pager was woken for in vain. */
			if
			:: record[i] == PENDING -> n++
			:: else
			fi;
			i++
		:: else -> i = 0; break
		od;
		nr_pagers--;
		orphaned = (nr_pagers == 0)
	}
	if
	:: orphaned ->
#ifndef BREAK_ORPHANED_WAKE
		wake(sb_clear[p], false)
#else
		skip
#endif
	:: else ->
#ifndef BREAK_NOTIFY_BACK
		do
		:: n > 0 -> notify_one(); n--
		:: else -> break
		od
#else
		skip
#endif
	fi;
	n = 0
}

/*
 * A pager: it resolves the page, because of a record or not, until userfault is
 * disabled. Once the page is resolved it need not care for further records. It may die
 * anywhere if `dies` is true. All of the files are there from the start.
 */
proctype pager(byte p; bool dies)
{
	byte i = 0, n = 0;
	byte w, its_id;

	do
	/* Resolve the page before anybody asks for it. */
	:: !resolved -> goto resolve
	/* kvm_userfault_take_record() */
	:: atomic {
		!ul ->
		w = NONE;
		its_id = 0;
		i = 0;
		do
		:: i < NW ->
			if
			:: record[i] == PENDING -> w = i	/* the last one will do */
			:: else
			fi;
			i++
		:: else -> i = 0; break
		od;
		if
		:: w != NONE ->
			assert(on_stack[w]);
			record[w] = p;
			its_id = id[w]
		:: else
		fi
	   };
	   if
	   :: w == NONE ->
		/* wait_event_interruptible_exclusive() */
		if
		:: !on -> goto stay
		:: else
		fi;
		/* Into the wait queue first, then look again. */
		reader_sleeps[p] = true;
		if
		:: !on ||
#ifndef BREAK_READER_RECHECK
		   record[0] == PENDING ||
#if NW > 1
		   record[1] == PENDING ||
#endif
#endif
		   false
		:: else ->
			/*
			 * A signal ends the sleep of a reader that nobody has woken.
			 * One that was woken looks for the record first, which it
			 * was woken for. Either its process dies, or just this
			 * thread stops to read.
			 */
			if
			:: atomic { dies && reader_sleeps[p] -> reader_sleeps[p] = false };
				break
#ifdef BREAK_READER_SIGNAL
			:: dies && !LAST_DIES -> reader_sleeps[p] = false; goto stay
#else
			:: atomic {
				dies && !LAST_DIES && reader_sleeps[p] ->
				reader_sleeps[p] = false };
				goto stay
#endif
			:: true ->
end_read:			!reader_sleeps[p]
			fi
		fi;
		reader_sleeps[p] = false
	   :: else ->
		if
		:: dies -> break		/* with the record read */
		:: !on -> goto stay		/* without */
		:: resolved			/* It went on by itself, or does so yet. */
		:: true ->
			/* copy_to_iter() fails: kvm_userfault_return_record() */
#ifdef BREAK_RETURN
			skip
#else
			atomic {
				!ul ->
#ifdef BREAK_BY_POINTER
				assert(on_stack[w]);
				record[w] = PENDING;
				n = 1
#else
				n = 0;
				if
				:: record[w] == p && id[w] == its_id ->
					assert(on_stack[w]);
					record[w] = PENDING;
					n = 1
				:: else
				fi
#endif
			}
			if
			:: n -> notify_one(); n = 0
			:: else
			fi
#endif
		:: true ->
			/* RESOLVE with an error */
			wake(sb_clear[p], true)
		:: !resolved ->
resolve:		filled = true;
			/*
			 * KVM_USERFAULT_RESOLVE, or a store to the mapping and
			 * WAKE_ONLY. The barrier of kvm_userfault_clear_range()
			 * is part of the store to `filled` here.
			 */
			sb_clear[p] = true;
			if
			:: dies -> break	/* between the two */
			:: true -> wake(sb_clear[p], false)
			fi;
			resolved = true
		fi
	   fi
	od;

	reader_sleeps[p] = false;
	del_pager();

	/* The file is not closed: others have it, too, or it is not needed any more. */
stay:	skip
}

/*
 * What else may happen once: RESOLVE with WAKE_ONLY while the page is armed, an access
 * is killed, userfault is disabled.
 */
proctype vmm()
{
	byte i = 0;

#ifdef WAKE
	wake(false, false);
#endif
#ifdef KILL
	atomic { killed[0] = true; sleeping[0] = false };
#endif
#ifdef DISABLE
	/* kvm_userfault_close_queue() */
	atomic { !ul -> sb_disable = true };
#ifndef BREAK_DISABLE_WAKE
	wake(sb_disable, false);
#endif
	!sb_disable;
	atomic {
		reader_sleeps[0] = false;
#if NP > 1
		reader_sleeps[1] = false
#endif
	}
#endif
	skip
}

init {
	byte w;

	atomic {
		w = 0;
		do
		:: w < NP -> run pager(w, w != 0 || LAST_DIES); w++
		:: else -> break
		od;
		w = 0;
		do
		:: w < NW -> run access(w); w++
		:: else -> break
		od;
		run vmm();
		w = 0
	}
}
