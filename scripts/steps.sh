# The steps of a demo: each says what it does, what it saw, and how long it took. To be sourced after lib.sh.

names=() seen=() times=()
current=''

seconds() { printf '%d.%01d' $(($1 / 1000)) $(($1 % 1000 / 100)); }
now() { date +%s%3N; }

step() {
    current="$1"
    began=$(now)
    title "$current"
}
saw() {
    local took=$(($(now) - began))
    names+=("$current") seen+=("$1") times+=("$(seconds $took) s")
    printf '   %s✓ %s%s %s(%s s)%s\n' "$green" "$1" "$plain" "$dim" "$(seconds $took)" "$plain"
    current=''
}
# Shows a command, and what it prints.
show() {
    printf '   %s$ %s%s\n' "$dim" "$*" "$plain"
    "$@" 2>&1 | sed -u 's/^/   /'
}
# Waits until a command succeeds: at most so many seconds, and for what.
wait_for() {
    local limit=$(($1 * 10)) what="$2"
    shift 2
    for _ in $(seq $limit); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    fail "not within $((limit / 10)) s: $what"
}

# What all steps saw, as a table; the argument is when they began.
table() {
    title "What was seen ($(seconds $(($(now) - $1))) s in all)"
    local i width=0
    for i in "${names[@]}"; do [ ${#i} -le $width ] || width=${#i}; done
    for i in "${!names[@]}"; do
        printf "   %-${width}s %9s   %s\n" "${names[$i]}" "${times[$i]}" "${seen[$i]}"
    done
}
