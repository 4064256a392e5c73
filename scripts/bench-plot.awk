# SPDX-License-Identifier: GPL-2.0
#
# bench-plot.awk: results.csv of scripts/bench to an SVG: instructions per fault
# over the number of vCPUs.

NR > 1 && $1 == "series" && $4 == "cost" && $3 ~ /^[0-9]+$/ {
	value[$2 "," $3] = $6
	if (index(" plain exit queue uffd ", " " $2 " ") && $6 > max)
		max = $6
}

function text(x, y, anchor, s) {
	printf "<text x=\"%d\" y=\"%d\" text-anchor=\"%s\">%s</text>\n", x, y, anchor, s
}

END {
	w = 640; h = 360; left = 70; bottom = 310; top = 40
	scale = (bottom - top) / (max ? max : 1)

	printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n", w, h
	printf "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", w, h
	text(left, 22, "start", "Instructions per fault of a vCPU on a page that is allocated")

	step = 5000
	for (y = 0; y <= max; y += step) {
		printf "<line x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" stroke=\"#ddd\"/>\n", left, bottom - y * scale, w - 20, bottom - y * scale
		text(left - 6, bottom - y * scale + 4, "end", y)
	}

	n = split("plain exit queue uffd", things, " ")
	split("plain fault|userfault exit|userfault queue|userfaultfd MINOR", names, "|")
	split("#888888 #1b7837 #2166ac #b2182b", colours, " ")
	split("1 8 64", vcpus, " ")
	for (g = 1; g <= 3; g++) {
		x = left + 20 + (g - 1) * 180
		for (i = 1; i <= n; i++) {
			v = value[things[i] "," vcpus[g]]
			if (!v)
				continue
			printf "<rect x=\"%d\" y=\"%.1f\" width=\"34\" height=\"%.1f\" fill=\"%s\"/>\n", x + (i - 1) * 37, bottom - v * scale, v * scale, colours[i]
			text(x + (i - 1) * 37 + 17, bottom - v * scale - 3, "middle", sprintf("%.0f", v))
		}
		text(x + 74, bottom + 16, "middle", vcpus[g] (vcpus[g] == 1 ? " vCPU" : " vCPUs"))
	}
	for (i = 1; i <= n; i++) {
		printf "<rect x=\"%d\" y=\"%d\" width=\"10\" height=\"10\" fill=\"%s\"/>\n", left + (i - 1) * 135, bottom + 30, colours[i]
		text(left + 14 + (i - 1) * 135, bottom + 39, "start", names[i])
	}
	print "</svg>"
}
