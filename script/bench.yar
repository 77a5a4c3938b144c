// What vmsight and yara-x both look for in the bench's dump: texts, wide and xored ones, bytes with gaps, expressions. Each rule
// matches by any one pattern, so that it is the same whether judged for all of memory or for a piece of it.
rule elf { strings: $a = { 7f 45 4c 46 02 01 01 } condition: $a }
rule accounts
{
    strings:
        $a = "root:x:0:0"
        $b = /[a-z]{3,10}:\$[56y]\$[A-Za-z0-9.\/]{4,22}\$/
    condition: any of them
}
rule addresses { strings: $a = /https?:\/\/[a-z0-9.\-]{4,60}\.(com|org|net)\// condition: $a }
rule passwords { strings: $a = "password" wide nocase $b = "passwd" nocase fullword condition: any of them }
rule miner { strings: $a = "stratum+tcp://" xor(1-255) condition: $a }
rule code { strings: $a = { 48 8b ?? 24 [4-8] e8 ?? ?? ?? ?? 48 85 c0 0f 84 } condition: $a }
rule shells { strings: $a = "/bin/sh\x00" $b = "#!/bin/bash" $c = { 68 2f 2f 73 68 68 2f 62 69 6e } condition: any of them }
