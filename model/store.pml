/* What is stored: promises G1, G2 and G5 of docs/design.md.
 *
 *   G1  at most one signature per record is ever stored.
 *   G2  accepted commits of one key never interleave.
 *   G5  every batch ends while some parent runs, and no key stays held.
 *
 * Three parents, two keys, two batches; enclaves answer, refuse or are lost.
 * Clocks may be as wrong as they like: a held batch can be taken over at any
 * time. A write can be applied although its answer is lost, can be lost itself,
 * and can arrive late, once its sender has given up on it, or a second time.
 * What a parent has read can be as old as it likes when it writes; with APART it
 * also reads the two items of a claim one after the other.
 *
 * Conditions are those of docs/design.md, fewer than the code's, which also
 * compares state and claim id in a commit. MUTANT_x leaves one out.
 */
#ifndef PARENTS
#define PARENTS 3
#endif
#define NK 2
#define NB 2
#define NONE 9
#ifndef ATTEMPTS
#define ATTEMPTS 2 /* quarantineAt of parent/pipeline */
#endif
#ifndef FREE
#define FREE 1 /* claims given back that do not count as attempts */
#endif
#ifndef LOST
#define LOST 1 /* answers lost */
#endif

mtype = { ready, claimed, signed, quarantined }
mtype state[NB] = ready;
byte fence[NB];          /* Batch.Fence */
byte keyOf[NB] = NONE;   /* Batch.KeyID */
byte attempts[NB];
byte owner[NB];          /* Batch.ClaimID: whose claim is the newest */
byte results[NB];        /* result segments written; one is allowed */
byte keyFence[NK];       /* Lease.Fence */
byte batchOf[NK] = NONE; /* Lease.BatchID; NONE: idle */
byte committed[NK];      /* key fence of the newest accepted commit */
byte dead, free, lost;
byte begun; /* parents that have looked once: they are alike, so by symmetry in order */

/* One write that its sender has given up on and that may still arrive. */
mtype = { nothing, claims, commits, releases }
mtype late = nothing;
byte lateB, lateK, lateF, lateG, lateTo, lateBy; bool lateTake;

#ifdef MUTANT_NO_BATCH_FENCE
#define SAMEFENCE(b, f) true
#else
#define SAMEFENCE(b, f) (fence[b] == f)
#endif
#ifdef MUTANT_NO_KEY_FENCE
#define SAMEKEY(k, g) true
#else
#define SAMEKEY(k, g) (keyFence[k] == g)
#endif
#ifdef MUTANT_NO_ABSENT
#define ABSENT(b) true
#else
#define ABSENT(b) (results[b] == 0)
#endif

#ifdef MUTANT_UNCOUNTED
#define COUNT(b) skip
#else
#define COUNT(b) attempts[b]++
#endif

/* A held key can always be had back: only with its batch, which names it. */
#define SOUND(k) (batchOf[k] == NONE || (state[batchOf[k]] == claimed && keyOf[batchOf[k]] == k))

/* Leases.Claim: Claim.Fits, Claim.FitsKey, Claim.Claimed, Batch.Taken */
#define FITS(b, k, f, g, t) (SAMEFENCE(b, f) && (state[b] == ready || state[b] == claimed) && (keyOf[b] == NONE || keyOf[b] == k) \
	&& SAMEKEY(k, g) && (t -> batchOf[k] == b : batchOf[k] == NONE))
inline claim(b, k, f, g, t, by) {
	if
	:: FITS(b, k, f, g, t) ->
		state[b] = claimed; fence[b] = f + 1; keyOf[b] = k; owner[b] = by; COUNT(b);
		keyFence[k] = g + 1; batchOf[k] = b;
		assert(SOUND(0) && SOUND(1))
	:: else
	fi
}

/* Leases.Commit: Batch.Holds, Batch.HoldsKey, Commit.Committed */
inline commit(b, k, f, g) {
	if
	:: ABSENT(b) && SAMEFENCE(b, f) && SAMEKEY(k, g) ->
		results[b]++; state[b] = signed; batchOf[k] = NONE;
		owner[b] = 0; keyOf[b] = NONE; attempts[b] = 0; /* which nobody looks at any more */
		assert(results[b] == 1);      /* G1 */
		assert(g > committed[k]);     /* G2 */
		committed[k] = g;
		assert(SOUND(0) && SOUND(1))
	:: else
	fi
}

/* Leases.Release: the same conditions, Batch.Released */
inline release(b, k, f, g, to) {
	if
	:: state[b] == claimed && SAMEFENCE(b, f) && SAMEKEY(k, g) ->
		state[b] = (to == 2 -> quarantined : ready);
		if
		:: to == 0 -> attempts[b]--; keyOf[b] = NONE /* nothing was sent */
		:: else
		fi;
		batchOf[k] = NONE; owner[b] = 0;
		if
		:: to == 2 -> keyOf[b] = NONE; attempts[b] = 0
		:: else
		fi;
		assert(SOUND(0) && SOUND(1))
	:: else
	fi
}

inline apply(what) {
	if
	:: what == claims -> claim(B, K, F, G, T, me + 1)
	:: what == commits -> commit(B, K, F, G)
	:: what == releases -> release(B, K, F, G, To)
	fi
}
inline postpone(what) {
	late = what; lateB = B; lateK = K; lateF = F; lateG = G; lateTo = To; lateTake = T; lateBy = me + 1
}

/* One call of the store whose answer may be lost. */
inline write(what) {
	if
	:: apply(what)                                       /* answered, or the answer is lost: */
	:: lost < LOST -> lost++                             /* the request is lost */
	:: lost < LOST && late == nothing -> lost++; postpone(what)              /* it arrives later */
	:: lost < LOST && late == nothing -> lost++; postpone(what); apply(what) /* it arrives twice */
	fi
}

inline forget() { B = 0; K = 0; F = 0; G = 0; T = false; To = 0 }
inline see(b, k, t) { B = b; K = k; F = fence[b]; G = keyFence[k]; T = t; begun = (me == begun -> begun + 1 : begun) }

/* With APART the two items are read one after the other: a window is older than
 * the batch that it is asked for, a held batch is read before its lease. */
#ifdef APART
#define LATER (T -> batchOf[K] == B : state[B] == ready && (keyOf[B] == NONE || keyOf[B] == K))
#endif

#define TURN (me <= begun)
#define CANHAVE(b, k) (TURN && (begun > 0 || b + k == 0) && state[b] == ready && batchOf[k] == NONE && (keyOf[b] == NONE || keyOf[b] == k))
#ifdef MUTANT_NO_TAKE_OVER
#define OVER(k) false
#else
#define OVER(k) (TURN && batchOf[k] != NONE && state[batchOf[k]] == claimed)
#endif
#define HOLDS (state[B] == claimed && fence[B] == F && keyOf[B] == K && owner[B] == me + 1)

proctype parent(byte me) {
	byte B, K, F, G, To; bool T;
find:
end:	if
	/* claimer.consider: two consistent reads; what follows may be much later */
	:: atomic { CANHAVE(0, 0) -> see(0, 0, false) }
	:: atomic { CANHAVE(0, 1) -> see(0, 1, false) }
	:: atomic { CANHAVE(1, 0) -> see(1, 0, false) }
	:: atomic { CANHAVE(1, 1) -> see(1, 1, false) }
	/* claimer.overdue; a batch with no attempt left is quarantined instead: claimer.quarantine */
	:: atomic { OVER(0) -> see(batchOf[0], 0, true) }
	:: atomic { OVER(1) -> see(batchOf[1], 1, true) }
	fi;
#ifdef APART
	if
	:: atomic { LATER ->
		if
		:: T -> G = keyFence[K]
		:: else -> F = fence[B]
		fi }
	:: atomic { !LATER -> forget(); goto find }
	fi;
#endif
	/* claimer.take */
	if
	:: atomic { T && attempts[B] >= ATTEMPTS -> To = 2; write(releases); forget(); goto find }
	:: atomic { !T || attempts[B] < ATTEMPTS -> write(claims);
		/* claimer.whatBecameOf: Claim.Made */
		if
		:: state[B] == claimed && fence[B] == F + 1 && owner[B] == me + 1 && keyOf[B] == K -> F++; G++; T = false
		:: else -> forget(); goto find
		fi }
	fi;
	/* worker.sign: signed, refused, or not sent at all */
	if
	:: atomic { true -> To = 3 }                                      /* worker.commit */
	:: atomic { true -> To = (attempts[B] >= ATTEMPTS -> 2 : 1) }      /* worker.giveBack, counted */
	:: atomic { free < FREE -> free++; To = 0 }                       /* worker.giveBack, not counted */
	:: atomic { dead < PARENTS - 1 -> dead++; forget(); goto gone }
	:: atomic { !HOLDS -> forget(); goto find }                       /* worker.drop */
	fi;
settle:
	/* pipeline.settle: while the claim still holds, the write was not applied: again */
	atomic {
		if
		:: To == 3 -> write(commits)
		:: else -> write(releases)
		fi;
		if
		:: HOLDS -> goto settle
		:: else -> forget(); goto find
		fi
	};
gone:	/* dead, or paused for ever */
end2:	false
}

/* A write that was given up arrives, or never does. */
active proctype network() {
end:	do
	:: atomic { late != nothing ->
		if
		:: late == claims -> claim(lateB, lateK, lateF, lateG, lateTake, lateBy)
		:: late == commits -> commit(lateB, lateK, lateF, lateG)
		:: late == releases -> release(lateB, lateK, lateF, lateG, lateTo)
		:: true
		fi;
		late = nothing; lateB = 0; lateK = 0; lateF = 0; lateG = 0; lateTo = 0; lateTake = false; lateBy = 0 }
	od
}

/* G5: nothing can move any more, so everything is at its end. */
active proctype atlast() {
	timeout ->
	assert(state[0] == signed || state[0] == quarantined);
	assert(state[1] == signed || state[1] == quarantined);
	assert(batchOf[0] == NONE && batchOf[1] == NONE)
}

init {
	atomic {
		run parent(0); run parent(1);
#if PARENTS == 3
		run parent(2)
#endif
	}
}
