/* Who may release signatures, and until when: promise G3 of docs/design.md.
 *
 *   G3  no signature is released after its lease has run out, nor under two
 *       fences of one key at once.
 *
 * Three parents, two enclaves, two keys, two batches. Writes to the store are
 * atomic and answered here; store.pml takes that apart. MUTANT_x leaves one rule
 * out. docs/model.md says what else is left out, and why it may be.
 *
 * Time is discrete, and every timer runs on the worst clock that the drift
 * allows: an enclave's loses DRIFT ticks between ticket and deadline, a
 * watcher's gains DRIFT ticks in a lease, tickets are as young as can be and
 * watchers look at once. That covers all other clocks: a timer only ever
 * permits (a release while it runs, a take-over when it has run out), and a
 * refusal or a later take-over is possible at any time anyway.
 */
#define NP 3 /* parents */
#define NE 2 /* enclaves */
#define NK 2 /* keys */
#define NB 2 /* batches */

/* The budget: claims of a run, of both keys together. Within it connections and
 * parents end at any step, enclaves at any time, and any number of times. */
#ifndef CLAIMS
#define CLAIMS 3
#endif

#define DRIFT 1
#define LONG 4
#define SHORT 3
#define LEASE(p) (p == 0 -> LONG : SHORT) /* pipeline.Config.Lease, in ticks */
#ifdef MUTANT_SMALL_MARGIN
#define MARGIN 1
#else
#define MARGIN 2 /* what both clocks can be off */
#endif

#define NONE 9
#define MAX(a, b) ((a) > (b) -> (a) : (b))

/* The store: control items and lease items. */
mtype = { ready, claimed, signed }
mtype state[NB] = ready;
byte keyOf[NB] = NONE;   /* Batch.KeyID; stays once something was sent */
byte fence[NK];          /* Lease.Fence */
byte batchOf[NK] = NONE; /* Lease.BatchID; NONE: idle */
byte bootOf[NK];         /* Lease.BootID: the enclave, */
bool bootUp[NK];         /* and whether that boot of it is still up */
byte lease[NK];          /* Lease.Lease */
byte watched[NK];        /* how long lease.Watch has seen the fence, in any parent */

/* gate.revoked of enclave/internal/sign, by enclave and key */
#define GATE(e, k) revoked[(e) * NK + (k)]
byte revoked[NE * NK];

/* Sign requests. A claim sends one at most, so key and fence name it. */
mtype = { none, sent, entered, released }
typedef Job {
	mtype at = none;
	byte enclave;
	byte left;  /* ticks until the deadline of Engine.deadline; from the claim on */
	bool orphan /* nobody waits for the answer */
}
#define MOST 4
#define JOB(k, f) job[(k) * MOST + (f) - 1]
Job job[NK * MOST];

byte claims;
bool second; /* parent 1 has claimed; 2 is like it, so by symmetry comes later */

/* What a parent remembers of its claim. */
byte myKey[NP];
byte myFence[NP];
byte myBatch[NP]; /* between reading and claiming, */
bool myTake[NP];  /* with whether the key was held */
byte myBoot[NP];
bool myBootUp[NP];
bool mySent[NP];

inline forget() {
	myKey[me] = 0; myFence[me] = 0; myBatch[me] = 0; myTake[me] = false;
	myBoot[me] = 0; myBootUp[me] = false; mySent[me] = false
}

/* Leases.Claim, as Claim.Claimed and Batch.Taken make it. The ticket was taken before. */
inline take(b, k, e, up) {
	fence[k]++; claims++;
	state[b] = claimed; keyOf[b] = k; batchOf[k] = b;
	bootOf[k] = e; bootUp[k] = up; lease[k] = LEASE(me);
#ifndef MUTANT_WATCH_ANY_FENCE
	watched[k] = DRIFT; /* Watch.Saw compares fences and starts anew */
#endif
	myFence[me] = fence[k]; myBatch[me] = 0; myTake[me] = false;
	myBoot[me] = e; myBootUp[me] = up; mySent[me] = false;
#ifndef MUTANT_TICKET_AFTER_CLAIM
	JOB(k, fence[k]).left = (up -> LEASE(me) - MARGIN + DRIFT : 0)
#endif
}

/* What Leases.Commit and Leases.Release make of the lease item: Lease.Idled. */
inline idle(k) {
	batchOf[k] = NONE; bootOf[k] = 0; bootUp[k] = false; lease[k] = 0;
#ifndef MUTANT_WATCH_ANY_FENCE
	watched[k] = 0
#endif
}

inline drop(k, f) { /* the request is gone */
	JOB(k, f).at = none; JOB(k, f).enclave = 0; JOB(k, f).left = 0; JOB(k, f).orphan = false
}

/* What can be released no more and is not waited for is as good as gone. */
#ifdef MUTANT_NO_FINAL_CHECK
#define sweep(i) skip
#else
inline sweep(i) {
	if
	:: job[i].orphan && (job[i].left == 0 || GATE(job[i].enclave, (i) / MOST) > (i) % MOST) ->
		job[i].at = none; job[i].enclave = 0; job[i].left = 0; job[i].orphan = false
	:: else
	fi
}
#endif
inline sweepKey(k) { sweep((k) * MOST); sweep((k) * MOST + 1); sweep((k) * MOST + 2); sweep((k) * MOST + 3) }

/* Nobody waits for the answer any more. */
inline abandon(k, f) {
	if
	:: JOB(k, f).at == sent || JOB(k, f).at == entered -> JOB(k, f).orphan = true
	:: else -> drop(k, f)
	fi
}

/* Which batch may be had with which idle key: Claim.Fits, Claim.FitsKey. By
 * symmetry the first claim is of batch 0 with key 0, on enclave 0. */
#define OPENS(b, k) (state[b] == ready && batchOf[k] == NONE && (keyOf[b] == NONE || keyOf[b] == k))
#define FREE(b, k) (claims < CLAIMS && OPENS(b, k) && (claims > 0 || (b == 0 && k == 0)))
#define HELD(k) (claims < CLAIMS && batchOf[k] != NONE)
#ifdef MUTANT_OWN_LEASE
#define RANOUT(k) (watched[k] >= LEASE(me))
#else
#define RANOUT(k) (watched[k] >= lease[k])
#endif
#define TURN (me < 2 || second)
#define MINE (batchOf[myKey[me]] != NONE && fence[myKey[me]] == myFence[me])
#define MYJOB JOB(myKey[me], myFence[me])

/* claimer.consider: what is read here may be old when the claim is made. */
inline see(b, k, held) {
	myKey[me] = k; myFence[me] = fence[k]; myBatch[me] = b; myTake[me] = held;
	second = second || me == 1
}

/* The conditions of Leases.Claim: whatever happened since, the items are still as seen. */
#ifdef MUTANT_STALE_CLAIM
#define ASSEEN true
#else
#define ASSEEN (fence[myKey[me]] == myFence[me])
#endif
#define FITS (claims < CLAIMS && ASSEEN && (myTake[me] -> batchOf[myKey[me]] == myBatch[me] : OPENS(myBatch[me], myKey[me])))

/* claimer.overdue asks for fence+1, and Engine.Fence -> gates.revoke answers. */
#ifdef MUTANT_FENCE_ANY_BOOT
#define FENCER(k) (1 - bootOf[k])
#define CANFENCE(k) HELD(k)
#else
#define FENCER(k) bootOf[k]
#define CANFENCE(k) (HELD(k) && bootUp[k])
#endif
inline fenceOff(k) {
	GATE(FENCER(k), k) = MAX(GATE(FENCER(k), k), fence[k]); sweepKey(k)
}

/* One slot of one parent: worker.carry and what it calls. It may stop between
 * any two steps, for any time. */
proctype parent(byte me) {
find:
end:	if
	/* a READY batch with an idle key: claimer.withKey */
	:: atomic { TURN && FREE(0, 0) -> see(0, 0, false) }
	:: atomic { TURN && FREE(0, 1) -> see(0, 1, false) }
	:: atomic { TURN && FREE(1, 0) -> see(1, 0, false) }
	:: atomic { TURN && FREE(1, 1) -> see(1, 1, false) }
	/* a batch whose lease ran out under our eyes: claimer.overdue, Watch.Saw */
	:: atomic { TURN && HELD(0) && RANOUT(0) -> see(batchOf[0], 0, true) }
	:: atomic { TURN && HELD(1) && RANOUT(1) -> see(batchOf[1], 1, true) }
	/* or whose enclave fences it off; where that answer is lost the parent sees nothing,
	 * and where it dies neither: the fence stays, and the next line is as if it had not been */
	:: atomic { TURN && CANFENCE(0) -> fenceOff(0); see(batchOf[0], 0, true) }
	:: atomic { TURN && CANFENCE(1) -> fenceOff(1); see(batchOf[1], 1, true) }
	fi;
	/* claimer.take, for either enclave: what was found waits for a slot with a fresh
	 * ticket (claimer.found), so the reads may be old, and the ticket is not */
	if
	:: atomic { FITS -> take(myBatch[me], myKey[me], 0, true) }
	:: atomic { FITS && claims > 0 -> take(myBatch[me], myKey[me], 1, true) }
	/* claimer.lostRace, or the process dies */
	:: atomic { true -> forget(); goto find }
	fi;
held:
	if
	/* worker.request */
	:: atomic { true ->
		mySent[me] = true;
#ifdef MUTANT_TICKET_AFTER_CLAIM
		MYJOB.left = (myBootUp[me] -> LEASE(me) - MARGIN + DRIFT : 0);
#endif
		if
		:: MYJOB.left > 0 && myBootUp[me] -> MYJOB.at = sent; MYJOB.enclave = myBoot[me]
		:: else -> drop(myKey[me], myFence[me]); goto give /* Engine.deadline, tickets.open */
		fi }
	/* worker.giveBack: shutdown, or no payload */
	:: atomic { true -> drop(myKey[me], myFence[me]); goto give }
	/* the process dies, and another starts in its place */
	:: atomic { true -> drop(myKey[me], myFence[me]); forget(); goto find }
	fi;
	/* Client.Sign */
	if
	:: atomic { MYJOB.at == released -> drop(myKey[me], myFence[me]); goto commit }
	/* any refusal at any time: deadline, fence_stale, busy, ... */
	:: atomic { MYJOB.at != released -> drop(myKey[me], myFence[me]); goto give }
	/* signclient.ErrLost */
	:: atomic { true -> abandon(myKey[me], myFence[me]) }
	/* the process dies, and another starts in its place */
	:: atomic { true -> abandon(myKey[me], myFence[me]); forget(); goto find }
	fi;
	/* worker.lost */
	if
#if defined(MUTANT_NO_CANCEL)
	:: atomic { true -> goto give }
#elif defined(MUTANT_CANCEL_ANY_BOOT)
	:: atomic { true ->
		GATE(1 - myBoot[me], myKey[me]) = MAX(GATE(1 - myBoot[me], myKey[me]), myFence[me]); goto give }
#else
	/* the boot that had the request confirms: Engine.Cancel -> gates.revoke */
	:: atomic { myBootUp[me] ->
		GATE(myBoot[me], myKey[me]) = MAX(GATE(myBoot[me], myKey[me]), myFence[me]);
		if
		:: myKey[me] == 0 -> sweepKey(0)
		:: else -> sweepKey(1)
		fi;
		if
		:: goto give
		:: forget(); goto find /* that answer is lost too, or the process dies */
		fi }
#endif
	/* worker.drop: let the lease run out */
	:: atomic { true -> forget(); goto find }
	fi;
give:
	/* Leases.Release, unless it is fenced out; Batch.Released */
	atomic {
		if
		:: MINE ->
			state[batchOf[myKey[me]]] = ready;
			keyOf[batchOf[myKey[me]]] = (mySent[me] -> myKey[me] : NONE);
			idle(myKey[me])
		:: else
		fi;
		forget(); goto find
	};
commit:
	/* Leases.Commit */
	atomic {
		if
		:: MINE ->
			state[batchOf[myKey[me]]] = signed;
			keyOf[batchOf[myKey[me]]] = NONE;
			idle(myKey[me])
		:: else
		fi;
		forget(); goto find
	}
}

/* The closure `current` of Engine.Sign, as lanes.release calls it. */
#if defined(MUTANT_NO_FINAL_CHECK)
#define CURRENT(k, f) true
#elif defined(MUTANT_IGNORE_REVOKED)
#define CURRENT(k, f) (JOB(k, f).left > 0)
#else
#define CURRENT(k, f) (JOB(k, f).left > 0 && GATE(JOB(k, f).enclave, k) < f)
#endif
#define ENTERS(k, f) (JOB(k, f).left > 0 && GATE(JOB(k, f).enclave, k) < f)

inline release(k, f) {
	if
	:: JOB(k, f).orphan -> drop(k, f)
	:: else -> JOB(k, f).at = released; JOB(k, f).left = 0
	fi
}

/* What an enclave makes of the request under fence f of key k. */
inline sign(k, f) {
	if
	/* gates.enter: a newer fence revokes the older ones (that it waits for them too is left out) */
	:: JOB(k, f).at == sent && ENTERS(k, f) ->
		JOB(k, f).at = entered;
		GATE(JOB(k, f).enclave, k) = MAX(GATE(JOB(k, f).enclave, k), f - 1);
		sweepKey(k)
	/* Engine.release: passing the last check is the release */
	:: JOB(k, f).at == entered && CURRENT(k, f) ->
		/* G3: the lease is held under this very fence, so under no other, */
		assert(batchOf[k] != NONE && fence[k] == f);
		/* and nobody has seen it run out. */
		assert(watched[k] < lease[k]);
		release(k, f)
	fi
}
#define OPEN(k, f) ((JOB(k, f).at == sent && ENTERS(k, f)) || (JOB(k, f).at == entered && CURRENT(k, f)))

inline count(i) { job[i].left = (job[i].left > 0 -> job[i].left - 1 : 0); sweep(i) }
inline crashJob(i, e) {
	if
	:: job[i].enclave == e && (job[i].at == sent || job[i].at == entered) ->
		job[i].at = none; job[i].enclave = 0; job[i].left = 0; job[i].orphan = false
	:: else
	fi
}
/* Boot id, ticket secret and gates are new: tickets.open refuses every older ticket. */
inline crash(e) {
	crashJob(0, e); crashJob(1, e); crashJob(2, e); crashJob(3, e);
	crashJob(4, e); crashJob(5, e); crashJob(6, e); crashJob(7, e);
	GATE(e, 0) = 0; GATE(e, 1) = 0;
	bootUp[0] = bootUp[0] && bootOf[0] != e; bootUp[1] = bootUp[1] && bootOf[1] != e;
	myBootUp[0] = myBootUp[0] && myBoot[0] != e;
	myBootUp[1] = myBootUp[1] && myBoot[1] != e;
	myBootUp[2] = myBootUp[2] && myBoot[2] != e
}

/* Enclaves and time. */
proctype world() {
end:	do
	:: atomic { OPEN(0, 1) -> sign(0, 1) }
	:: atomic { OPEN(0, 2) -> sign(0, 2) }
	:: atomic { OPEN(0, 3) -> sign(0, 3) }
	:: atomic { OPEN(0, 4) -> sign(0, 4) }
	:: atomic { OPEN(1, 1) -> sign(1, 1) }
	:: atomic { OPEN(1, 2) -> sign(1, 2) }
	:: atomic { OPEN(1, 3) -> sign(1, 3) }
	:: atomic { OPEN(1, 4) -> sign(1, 4) }
	:: d_step { claims > 0 -> crash(0) }
	:: d_step { claims > 0 -> crash(1) }
	:: d_step { true -> /* a tick, on every clock */
		count(0); count(1); count(2); count(3); count(4); count(5); count(6); count(7);
		watched[0] = (batchOf[0] != NONE && watched[0] < LONG -> watched[0] + 1 : watched[0]);
		watched[1] = (batchOf[1] != NONE && watched[1] < LONG -> watched[1] + 1 : watched[1]) }
	od
}

init {
	atomic { run parent(0); run parent(1); run parent(2); run world() }
}
