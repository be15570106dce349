/* Which key is taken next: promise G4 of docs/design.md.
 *
 *   G4  keys are taken least recently used first: exactly, with one claimer;
 *       with W claims in flight at most W older idle keys are overtaken.
 *
 * PARENTS parents with one claim in flight each and a window each, KEYS keys.
 * The index is exact at the moment a window is filled; what a parent knows
 * itself is never older than the index (lease.Window.own). A parent may stop
 * between choosing a key and claiming it.
 */
#ifndef PARENTS
#define PARENTS 3
#endif
#define KEYS 3
#ifndef CLAIMS
#define CLAIMS 5
#endif
#define NONE 9
byte used[KEYS];           /* Lease.Used */
bool held[KEYS];
byte fence[KEYS];          /* Lease.Fence */
byte claims;

/* lease.Window, by parent and key */
#define AT(p, k) ((p) * KEYS + (k))
bool idle[9];              /* Window.idle, */
byte stamp[9];             /* with the stamp, */
byte seen[9];              /* and the fence of the entry */
byte highest[3], horizon[3];
byte over;

#define OLDER(j, u) (!held[j] && used[j] < (u))
#define FIRST(k) (idle[AT(me, k)] \
	&& (!idle[AT(me, 0)] || stamp[AT(me, 0)] >= stamp[AT(me, k)]) \
	&& (!idle[AT(me, 1)] || stamp[AT(me, 1)] >= stamp[AT(me, k)]) \
	&& (!idle[AT(me, 2)] || stamp[AT(me, 2)] >= stamp[AT(me, k)]))
#define EMPTY (!idle[AT(me, 0)] && !idle[AT(me, 1)] && !idle[AT(me, 2)])
/* Window.stale. Its age condition is KEPT: within a tenth of a lease a window is used beyond its horizon. */
#ifdef MUTANT_NO_HORIZON
#define PAST(k) false
#else
#define PAST(k) (stamp[AT(me, k)] > horizon[me])
#endif

inline learn(k) { /* Window.learn: what a consistent read or a claim of one's own said */
	idle[AT(me, k)] = !held[k]; stamp[AT(me, k)] = used[k]; seen[AT(me, k)] = fence[k];
	highest[me] = (used[k] > highest[me] -> used[k] : highest[me])
}
inline fill() { /* Window.fill, merge */
	learn(0); learn(1); learn(2); horizon[me] = highest[me]
}
/* claimer.take -> store.Claim, with Window.Stamp; lostRace where it was taken */
inline take(k) {
	if
	:: !held[k] && fence[k] == seen[AT(me, k)] ->
		over = 0;
		over = over + (OLDER(0, used[k]) -> 1 : 0);
		over = over + (OLDER(1, used[k]) -> 1 : 0);
		over = over + (OLDER(2, used[k]) -> 1 : 0);
		assert(over <= PARENTS - 1); /* of the others; one claimer: none */
		over = 0;
#ifdef MUTANT_OWN_STAMP
		used[k] = used[k] + 1;
#else
		used[k] = (highest[me] + 1 > used[k] -> highest[me] + 1 : used[k]);
#endif
		fence[k]++; held[k] = true; claims++;
		learn(k); mine = k
	:: else -> learn(k)
	fi
}

proctype parent(byte me) {
	byte mine = NONE, next = NONE;
end:	do
	/* claimer.withKey -> Window.Next */
	:: atomic { mine == NONE && next == NONE && claims < CLAIMS ->
		if
		:: EMPTY || (FIRST(0) && PAST(0)) || (FIRST(1) && PAST(1)) || (FIRST(2) && PAST(2)) -> fill()
		:: else
		fi;
		if
		:: FIRST(0) -> next = 0
		:: FIRST(1) -> next = 1
		:: FIRST(2) -> next = 2
		:: else
		fi }
	:: atomic { next != NONE ->
		if
		:: next == 0 -> take(0)
		:: next == 1 -> take(1)
		:: next == 2 -> take(2)
		fi;
		next = NONE }
	:: atomic { mine != NONE ->
		if
		:: mine == 0 -> held[0] = false; learn(0)
		:: mine == 1 -> held[1] = false; learn(1)
		:: mine == 2 -> held[2] = false; learn(2)
		fi;
		mine = NONE }
	od
}
init { byte i; atomic { do :: i < PARENTS -> run parent(i); i++ :: else -> break od; i = 0 } }
