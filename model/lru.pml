/* Which key is taken next: promise G4 of docs/design.md.
 *
 *   G4  keys are taken least recently used first: exactly, with one claimer;
 *       with W claims in flight at most W older idle keys are overtaken.
 *
 * PARENTS parents with one claim in flight each and a window each, KEYS keys.
 * A parent may stop between choosing a key and claiming it. Keys are alike but
 * for ties, which their order decides as the code's ids do. Which of two keys was
 * used longer ago is a matter of stamps; with one claimer, of the claims themselves.
 *
 * LAG: the index may be answered as it was before the newest write.
 * AGE: a parent fills its window whenever it likes, also not at all while a key
 *      is in it, which covers whatever the code does about a window's age (ADR 11).
 * NAMED: there are batches that name their key too, and so take it out of turn.
 */
#ifndef PARENTS
#define PARENTS 2
#endif
#ifndef KEYS
#define KEYS 3
#endif
#ifndef CLAIMS
#define CLAIMS 5
#endif
#ifndef OVERTAKEN
#define OVERTAKEN KEYS /* no bound in numbers */
#endif
#define NONE 9
#if PARENTS == 1
#define OLDER(i, k) (when[i] < when[k])
#else
#define OLDER(i, k) (used[i] < used[k])
#endif
byte used[KEYS];           /* Lease.Used */
byte when[KEYS];           /* the number of its newest claim */
bool held[KEYS];
byte fence[KEYS];          /* Lease.Fence */
byte claims;

/* The index as it was: what the newest write changed. */
byte last = NONE, lastUsed, lastFence;
bool lastHeld;

/* lease.Window, by parent and key */
#define AT(p, k) ((p) * KEYS + (k))
#define CELLS (PARENTS * KEYS)
bool idle[CELLS];          /* Window.idle, */
byte stamp[CELLS];         /* with the stamp, */
byte seen[CELLS];          /* and the fence of the entry */
bool own[CELLS];           /* Window.own: a claim or a consistent read of one's own, */
bool ownIdle[CELLS];       /* knowledge.idle, */
byte ownStamp[CELLS];      /* knowledge.key */
byte ownFence[CELLS];
bool late[CELLS];          /* others gave the key back, and the window's image does not show it */
byte highest[PARENTS], horizon[PARENTS];

byte i, j, first, over;
bool past, unseen;
bool hh; byte uu, ff;

/* The choice of Window.Next: least recently used, then by id; NONE where the window is empty. */
inline choose() {
	first = NONE; i = 0;
	do
	:: i < KEYS ->
		if
		:: idle[AT(me, i)] && (first == NONE || stamp[AT(me, i)] < stamp[AT(me, (first == NONE -> 0 : first))]) -> first = i
		:: else
		fi;
		i++
	:: else -> break
	od;
	i = 0
}

/* Window.learn: what a consistent read or a claim of one's own said */
inline learn(k) {
	own[AT(me, k)] = true; ownIdle[AT(me, k)] = !held[k]; ownFence[AT(me, k)] = fence[k];
	ownStamp[AT(me, k)] = (held[k] -> 0 : used[k]);
	enter(k)
}
inline enter(k) { /* Window.insert */
	idle[AT(me, k)] = ownIdle[AT(me, k)];
	stamp[AT(me, k)] = (ownIdle[AT(me, k)] -> ownStamp[AT(me, k)] : 0);
	seen[AT(me, k)] = (ownIdle[AT(me, k)] -> ownFence[AT(me, k)] : 0);
	highest[me] = (used[k] > highest[me] -> used[k] : highest[me])
}

/* The index entry is newer than one's own knowledge: others used the key since,
 * or gave it back under the fence under which it was held. */
#ifdef MUTANT_HELD_FOR_EVER
#define NEWER(k) (ownFence[AT(me, k)] < ff)
#else
#define NEWER(k) (ownFence[AT(me, k)] < ff || (ownFence[AT(me, k)] == ff && !ownIdle[AT(me, k)]))
#endif

inline fill() { /* Window.fill, Window.merge */
	i = 0;
	do
	:: i < KEYS ->
		if
		:: unseen && i == last -> hh = lastHeld; uu = lastUsed; ff = lastFence
		:: else -> hh = held[i]; uu = used[i]; ff = fence[i]
		fi;
		late[AT(me, i)] = unseen && i == last && !held[i] && lastHeld && !(own[AT(me, i)] && ownIdle[AT(me, i)]);
		idle[AT(me, i)] = false; stamp[AT(me, i)] = 0; seen[AT(me, i)] = 0;
		if
		:: !hh ->
			highest[me] = (uu > highest[me] -> uu : highest[me]);
			if
			:: own[AT(me, i)] && NEWER(i) -> own[AT(me, i)] = false; ownIdle[AT(me, i)] = false; ownStamp[AT(me, i)] = 0; ownFence[AT(me, i)] = 0
			:: else
			fi;
			if
			:: !own[AT(me, i)] -> idle[AT(me, i)] = true; stamp[AT(me, i)] = uu; seen[AT(me, i)] = ff
			:: else
			fi
		:: else
		fi;
		if
		:: own[AT(me, i)] && ownIdle[AT(me, i)] ->
			idle[AT(me, i)] = true; stamp[AT(me, i)] = ownStamp[AT(me, i)]; seen[AT(me, i)] = ownFence[AT(me, i)]
		:: else
		fi;
		i++
	:: else -> break
	od;
	horizon[me] = highest[me];
	i = 0; hh = false; uu = 0; ff = 0
}

inline note(k) { last = k; lastHeld = held[k]; lastUsed = used[k]; lastFence = fence[k] }

/* claimer.take -> Leases.Claim, with Window.Stamp; claimer.lostRace where it was taken */
inline take(k) {
	if
	:: !held[k] && fence[k] == seen[AT(me, k)] ->
		over = 0; i = 0;
		do
		:: i < KEYS ->
			if
			:: !named && !held[i] && OLDER(i, k) ->
				over++;
				/* whatever is overtaken was given back by somebody else after the image that the window shows */
				assert(late[AT(me, i)])
			:: else
			fi;
			i++
		:: else -> break
		od;
		assert(over <= OVERTAKEN);
		over = 0; i = 0;
		note(k);
#ifdef MUTANT_OWN_STAMP
		used[k] = used[k] + 1;
#else
		used[k] = (highest[me] + 1 > used[k] -> highest[me] + 1 : used[k]);
#endif
		fence[k]++; held[k] = true; claims++; when[k] = claims;
		learn(k); mine = k
	:: else -> learn(k)
	fi
}
inline giveBack(k) { /* Leases.Commit, Leases.Release; Window.Return */
	note(k);
	held[k] = false;
	learn(k);
	i = 0;
	do
	:: i < PARENTS -> late[AT(i, k)] = late[AT(i, k)] || i != me; i++
	:: else -> break
	od;
	i = 0
}

#ifdef MUTANT_NO_HORIZON
#define PAST false
#else
#define PAST (first != NONE && stamp[AT(me, (first == NONE -> 0 : first))] > horizon[me])
#endif

proctype parent(byte me) {
	byte mine = NONE, next = NONE; bool named;
end:	do
	/* claimer.withKey -> Window.Next, Window.stale */
	:: atomic { mine == NONE && next == NONE && claims < CLAIMS && (claims > 0 || me == 0) ->
		choose();
		past = first == NONE || PAST;
		if
#ifdef AGE
		:: first != NONE -> past = false
		:: past = true
#else
		:: true
#endif
		fi;
		if
		:: past ->
			if
			:: unseen = false
#ifdef LAG
			:: last != NONE -> unseen = true
#endif
			fi;
			d_step { fill(); choose() }
		:: else
		fi;
		unseen = false; past = false;
		next = first; first = NONE }
#ifdef NAMED
	/* a batch with a key of its own: Leases.Lease, consistently */
	:: atomic { mine == NONE && next == NONE && claims < CLAIMS ->
		select(next : 0 .. KEYS - 1);
		if
		:: held[next] -> next = NONE
		:: else -> learn(next); named = true
		fi }
#endif
	:: atomic { next != NONE -> d_step { take(next); next = NONE; named = false } }
	:: atomic { mine != NONE -> d_step { giveBack(mine); mine = NONE } }
	od
}
init { byte n; atomic { do :: n < PARENTS -> run parent(n); n++ :: else -> break od; n = 0 } }
